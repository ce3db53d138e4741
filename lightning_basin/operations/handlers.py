"""Which function finds the uses of parameters in which operation of torch."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning_basin.operations.elementwise import (
    _add,
    _batch_norm,
    _div,
    _fused_cell,
    _group_norm,
    _in_place,
    _layer_norm,
    _mul,
    _prelu,
    _rms_norm,
    _sub,
)
from lightning_basin.operations.lookups import _embedding, _embedding_bag, _index, _index_select
from lightning_basin.operations.products import _addmm, _bmm, _convolution, _mm, _mv, _trilinear
from lightning_basin.operations.uses import Use, aten

HANDLERS: Mapping[Any, Callable[..., list[Use]]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.bmm.default: _bmm,
    aten.mv.default: _mv,
    aten._trilinear.default: _trilinear,
    aten.convolution.default: _convolution,
    aten.embedding.default: _embedding,
    aten._embedding_bag.default: _embedding_bag,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.mul.Tensor: _mul,
    aten.mul_.Tensor: _in_place(_mul),
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.sub_.Tensor: _sub,
    aten.div.Tensor: _div,
    aten.div_.Tensor: _in_place(_div),
    aten._prelu_kernel.default: _prelu,
    aten._thnn_fused_gru_cell.default: _fused_cell,
    aten._thnn_fused_lstm_cell.default: _fused_cell,
    aten.native_layer_norm.default: _layer_norm,
    aten._fused_rms_norm.default: _rms_norm,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_group_norm.default: _group_norm,
}

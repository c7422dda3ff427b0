"""VPTQ: vectors of consecutive outputs of one input share a code, an index into a codebook."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from aptq import packing
from aptq.api import AptqError, Option, QuantizedWeight
from aptq.formats.codebooks import Spec
from aptq.formats.grouped import check_group
from aptq.formats.kmeans import KMeans
from aptq.formats.scales import FLOATS, stored_scale
from aptq.formats.vector_grid import SCALES, VectorGrid


@dataclass(frozen=True)
class Vector:
    """``W[m v : (m + 1) v, j] = (C[i] + R[r]) row_scale[m] column_scale[j]``, with a code ``i``, ``r`` for each vector.

    ``bits_1`` to ``bits_4`` say what vectors and codebooks stand for a width (see ``codebooks.Spec``); what they take
    in truth, codebooks and all, is in the storage bits. ``group_size`` consecutive inputs share their codebooks, -1:
    all of a layer. The share ``outliers`` of inputs, those of the largest importance, has a codebook of its own,
    ``outlier_codebook``, whose vectors are a whole part of the others. ``normalize`` divides columns and rows of
    vectors by their root mean squares. Codebooks and scales are rounded to ``scale_dtype`` *before* codes are chosen.

    Codebooks are fitted by k-means (``iterations``, ``tolerance``, ``samples`` vectors a centroid, ``seed``), a
    vector's weight being the importance of its column; then up to ``refits`` times to the columns that the quantizer's
    error feedback made of the weights; and in ``finetune`` rounds, scales too, to the objective itself once codes are
    chosen. ``beam`` centroids are tried with the residual ones for each vector.

    Source: Liu et al., "VPTQ" (EMNLP 2024, arXiv 2409.17066).
    """

    group_size: int = -1
    bits_1: str = "v8-k256"
    bits_2: str = "v4-k256"
    bits_3: str = "v4-k64-64"
    bits_4: str = "v2-k256"
    outliers: float = 0.0
    outlier_codebook: str = "v2-k256"
    normalize: str = "both"
    scale_dtype: str = "float16"
    iterations: int = 20
    tolerance: float = 1e-3
    samples: int = 256
    seed: int = 0
    refits: int = 2
    finetune: int = 0
    beam: int = 16

    def __post_init__(self) -> None:
        if self.scale_dtype not in FLOATS:
            raise AptqError(f"format.scale_dtype={self.scale_dtype!r} is not known; use one of {', '.join(FLOATS)}.")
        if self.normalize not in SCALES:
            raise AptqError(f"format.normalize={self.normalize!r} is not known; use one of {', '.join(SCALES)}.")
        check_group(Option(bits=2, group_size=self.group_size))
        if not 0.0 <= self.outliers < 1.0:
            raise AptqError(f"format.outliers={self.outliers} is not allowed; use a share of inputs from 0 to below 1.")
        least = {"iterations": 1, "samples": 1, "refits": 0, "finetune": 0, "beam": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise AptqError(f"format.{name}={getattr(self, name)} is not allowed; use {low} or more.")
        if Spec.parse(self.outlier_codebook, "format.outlier_codebook").residual:
            raise AptqError(
                f"format.outlier_codebook={self.outlier_codebook} is not allowed: no residual centroids there."
            )
        for bits in range(1, 5):
            self.spec(bits)

    def spec(self, bits: int) -> Spec:
        """Return what stands for a width of 1 to 4 bits."""
        return Spec.parse(getattr(self, f"bits_{bits}"), f"format.bits_{bits}")

    def num_outliers(self, in_features: int) -> int:
        """Return how many inputs have the finer codebook."""
        return min(round(self.outliers * in_features), in_features - 1)

    def check(self, option: Option, shape: tuple[int, int]) -> None:
        """Raise ``AptqError`` for bits outside 1-4, a meaningless group size, or outliers that do not fit in."""
        if not 1 <= option.bits <= 4:
            raise AptqError(f"Format vector has widths of 1 to 4 bits; got bits={option.bits}.")
        check_group(option)
        for finer in self._finer(shape[1]):
            parts, rest = divmod(self.spec(option.bits).length, finer.length)
            if rest or parts * finer.index_bits > 62:
                raise AptqError(
                    f"format.outlier_codebook={self.outlier_codebook} cannot stand beside format.bits_{option.bits}="
                    f"{getattr(self, f'bits_{option.bits}')}: its vectors have to be a whole part of the others, with "
                    "at most 62 bits of indices for one of those."
                )

    def fit(self, weight: Tensor, option: Option, importance: Tensor | None = None) -> VectorGrid:
        """Fit scales and codebooks to a weight ``[heads, rows, in]`` (see the class).

        Raises:
            AptqError: several heads, the rows of which are no multiple of the vectors.
        """
        heads, rows, width = weight.shape
        spec = self.spec(option.bits)
        if heads > 1 and rows % spec.length:
            raise AptqError(
                f"The {rows} rows of a head cannot be cut into vectors of {spec.length} (format.bits_{option.bits}="
                f"{getattr(self, f'bits_{option.bits}')}); use a length that divides {rows}, or a Hessian without "
                "heads (hessian=input)."
            )
        if importance is None:
            importance = torch.ones(heads, width, device=weight.device)
        outliers = importance.mean(0).topk(self.num_outliers(width)).indices.sort().values
        columns = weight.transpose(1, 2).float()  # [heads, in, rows]
        by_column, by_row = self._scales(columns, spec.length, option.bits)
        grid = VectorGrid(
            books=(),
            outliers=outliers,
            book=_books(outliers, option, width),
            column_scale=by_column,
            row_scale=by_row,
            normalize=self.normalize,
            importance=importance.float(),
            order=torch.arange(width, device=weight.device).expand(heads, -1),
            rows=rows,
            length=spec.length,
            dtype=FLOATS[self.scale_dtype],
            means=KMeans(self.iterations, self.tolerance, self.samples, self.seed),
            refits=self.refits,
            finetune=self.finetune,
        )
        specs = [spec] * option.num_groups(width - len(outliers))
        return grid.fitted(columns, [*specs, *self._finer(width)], self.beam)

    def _finer(self, in_features: int) -> list[Spec]:
        """Return the outliers' codebook, if there are any outliers."""
        return [Spec.parse(self.outlier_codebook, "format.outlier_codebook")] * bool(self.num_outliers(in_features))

    def _scales(self, columns: Tensor, length: int, bits: int) -> tuple[Tensor, Tensor]:
        """Return the scales ``[in]`` and ``[heads, V]`` of ``columns [heads, in, rows]``, 1 where there are none."""
        heads, width, rows = columns.shape
        by_column, unit = torch.ones(width, device=columns.device), torch.ones((), device=columns.device)
        by_row = torch.ones(heads, -(-rows // length), device=columns.device)
        if "column_scales" in SCALES[self.normalize]:
            by_column = stored_scale(columns.square().mean((0, 2)).sqrt(), self.scale_dtype, unit, bits)
        if "row_scales" in SCALES[self.normalize]:
            squares = (columns / by_column[:, None]).square().mean(1)  # [heads, rows]
            mean = torch.stack([part.mean(1) for part in squares.split(length, 1)], dim=1)
            by_row = stored_scale(mean.sqrt(), self.scale_dtype, unit, bits)
        return by_column, by_row

    def dequantize(self, quantized: QuantizedWeight, option: Option) -> Tensor:
        """Return the weight as float32 ``[out, in]`` (a transposed view of memory ``[in, out]``)."""
        parameters = quantized.parameters
        out_features = int(parameters["out_features"])
        length = self.spec(option.bits).length
        outliers = parameters.get("outlier_columns", torch.empty(0, device=quantized.codes.device)).long()
        width = quantized.codes.shape[1] + len(outliers)
        book = _books(outliers, option, width)
        common = book < len(parameters["codebook"])
        vectors = parameters["codebook"].float()[book[common], quantized.codes.T.long().T].transpose(0, 1)  # [in, V, v]
        if "residual_codebook" in parameters:
            residual = parameters["residual_codebook"].float()
            vectors = vectors + residual[book[common], parameters["residual_codes"].long()].transpose(0, 1)
        rows = vectors.shape[1] * length
        weight = torch.empty(width, rows, device=vectors.device)
        weight[common] = vectors.flatten(1)
        if len(outliers):
            finer = parameters["outlier_codebook"].float()[parameters["outlier_codes"].T.long()].flatten(1)
            weight[outliers] = functional.pad(finer, (0, rows - finer.shape[1]))[:, :rows]
        by_row = parameters.get("row_scales", torch.ones(rows // length, device=weight.device)).float()
        by_column = parameters.get("column_scales", torch.ones(width, device=weight.device)).float()
        weight.unflatten(1, (-1, length)).mul_((by_row * by_column[:, None])[..., None])
        return weight[:, :out_features].T

    def pack(self, quantized: QuantizedWeight, option: Option) -> dict[str, Tensor]:
        """Return indices (see ``aptq.packing``), codebooks, scales and outliers; see ``packed_layout``."""
        bits = self._widths(option)
        packed = {"indices": packing.pack(quantized.codes, bits["indices"])}
        for name, tensor in quantized.parameters.items():
            if name.endswith("_codes"):
                name = name.replace("_codes", "_indices")
                packed[name] = packing.pack(tensor, bits[name])
            elif name != "out_features":
                packed[name] = tensor.contiguous()
        return packed

    def _widths(self, option: Option) -> dict[str, int]:
        """Return the bits of the indices by their name."""
        spec, finer = self.spec(option.bits), Spec.parse(self.outlier_codebook, "format.outlier_codebook")
        return {
            "indices": spec.index_bits,
            "residual_indices": spec.residual_bits,
            "outlier_indices": finer.index_bits,
        }

    def unpack(self, tensors: Mapping[str, Tensor], option: Option, shape: tuple[int, int]) -> QuantizedWeight:
        """Invert ``pack``."""
        bits, outliers = self._widths(option), self.num_outliers(shape[1])
        parameters: dict[str, Tensor] = {"out_features": torch.tensor(shape[0])}
        for name, tensor in tensors.items():
            if name == "outlier_indices":
                parameters["outlier_codes"] = packing.unpack(tensor, bits[name], outliers)
            elif name == "residual_indices":
                parameters["residual_codes"] = packing.unpack(tensor, bits[name], shape[1] - outliers)
            elif name != "indices":
                parameters[name] = tensor
        codes = packing.unpack(tensors["indices"], bits["indices"], shape[1] - outliers)
        return QuantizedWeight(codes=codes, parameters=parameters)

    def packed_layout(self, option: Option, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of the tensors that ``pack`` gives."""
        out_features, in_features = shape
        spec, stored, bits = self.spec(option.bits), FLOATS[self.scale_dtype], self._widths(option)
        outliers = self.num_outliers(in_features)
        common, vectors = in_features - outliers, -(-out_features // spec.length)
        groups = option.num_groups(common)
        layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "indices": (packing.packed_shape(vectors, common, bits["indices"]), torch.int32),
            "codebook": ((groups, spec.centroids, spec.length), stored),
        }
        if spec.residual:
            layout["residual_indices"] = packing.packed_shape(vectors, common, bits["residual_indices"]), torch.int32
            layout["residual_codebook"] = (groups, spec.residual, spec.length), stored
        for finer in self._finer(in_features):
            parts = -(-out_features // finer.length)
            layout["outlier_indices"] = packing.packed_shape(parts, outliers, bits["outlier_indices"]), torch.int32
            layout["outlier_codebook"] = (finer.centroids, finer.length), stored
            layout["outlier_columns"] = (outliers,), torch.int32
        sizes = {"column_scales": in_features, "row_scales": vectors}
        return layout | {name: ((sizes[name],), stored) for name in SCALES[self.normalize]}


def _books(outliers: Tensor, option: Option, in_features: int) -> Tensor:
    """Return each column's codebook ``[in]``: that of its group among those that are no outliers, else the last one."""
    book = torch.zeros(in_features, dtype=torch.int64, device=outliers.device)
    is_common = torch.ones(in_features, dtype=torch.bool, device=outliers.device)
    is_common[outliers] = False
    common = in_features - len(outliers)
    place = torch.arange(common, device=outliers.device)
    book[is_common] = place // option.group_width(common)
    book[outliers] = option.num_groups(common)
    return book

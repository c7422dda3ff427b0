"""The contracts between components: all that a plug-in has to import.

A component is a frozen dataclass whose fields are its options and which satisfies one of the protocols below. It
need not inherit from anything. It reaches the program through an entry point in the group of its kind
(``aptq.formats``, ``aptq.quantizers``, ...) and a YAML file with the same name in the config group of its kind.

Shapes: ``out`` and ``in`` are the output and input width of a layer's weight ``[out, in]``; ``heads`` is the number of
row blocks that have a curvature of their own (1 for most layers), ``rows = out / heads``.

Units: a curvature is the Hessian of the estimator's objective *per calibration token and per average output row*: with
the layer objective ``sum ||dW x||^2 / tokens`` it is ``2/tokens * sum x x^T``. Costs of one estimator are comparable
across layers; costs of different estimators are not.
"""

from aptq.api.activations import (
    ActivationQuantizer,
)
from aptq.api.allocation import (
    Allocation,
    Allocator,
    BudgetedAllocator,
    DivergenceMetric,
    FrontAllocator,
    GroupedAllocator,
    LayerStatistics,
    LossChange,
    LossMetric,
    MeasuringAllocator,
    PlanJudge,
    SensitivityMetric,
    TimedAllocator,
)
from aptq.api.curvature import (
    BlockObserver,
    Curvature,
    CurvatureSum,
    DriftEstimator,
    DriftObserver,
    GuidedEstimator,
    HessianEstimator,
    LayerObserver,
    SequentialEstimator,
)
from aptq.api.execution import (
    ActivationBackend,
    Backend,
    LayerSpec,
    TransformBackend,
    transforms_inputs,
)
from aptq.api.model import (
    Block,
    BlockInputs,
    Layer,
    Option,
)
from aptq.api.results import (
    MEAN_OF_TASKS,
    STANDARD_ERROR,
    ActivationExporter,
    Callback,
    EmbeddingExporter,
    EvaluationText,
    Evaluator,
    Exporter,
    ExportJob,
    LayerReport,
    StoredEmbedding,
    TaskEvaluator,
    TransformExporter,
    judges_texts,
)
from aptq.api.rounding import (
    DraftQuantizer,
    DriftQuantizer,
    EntryGrid,
    Factors,
    Format,
    FormatSet,
    Grid,
    QuantizedWeight,
    Quantizer,
    RefitGrid,
    RoundableFormat,
    Rounded,
    RowFormat,
    TransformFormat,
    TunedGrid,
    format_of,
)
from aptq.api.transforms import (
    Rotation,
    RotationTransform,
    Transform,
)
from aptq.errors import (
    AptqError,
)

__all__ = [
    "MEAN_OF_TASKS",
    "STANDARD_ERROR",
    "ActivationBackend",
    "ActivationExporter",
    "ActivationQuantizer",
    "Allocation",
    "Allocator",
    "AptqError",
    "Backend",
    "Block",
    "BlockInputs",
    "BlockObserver",
    "BudgetedAllocator",
    "Callback",
    "Curvature",
    "CurvatureSum",
    "DivergenceMetric",
    "DraftQuantizer",
    "DriftEstimator",
    "DriftObserver",
    "DriftQuantizer",
    "EmbeddingExporter",
    "EntryGrid",
    "EvaluationText",
    "Evaluator",
    "ExportJob",
    "Exporter",
    "Factors",
    "Format",
    "FormatSet",
    "Grid",
    "FrontAllocator",
    "GroupedAllocator",
    "GuidedEstimator",
    "HessianEstimator",
    "Layer",
    "LayerObserver",
    "LayerReport",
    "LayerSpec",
    "LayerStatistics",
    "LossChange",
    "LossMetric",
    "MeasuringAllocator",
    "Option",
    "PlanJudge",
    "Quantizer",
    "QuantizedWeight",
    "RefitGrid",
    "Rotation",
    "RotationTransform",
    "RoundableFormat",
    "Rounded",
    "RowFormat",
    "SensitivityMetric",
    "SequentialEstimator",
    "StoredEmbedding",
    "TaskEvaluator",
    "TimedAllocator",
    "Transform",
    "TransformBackend",
    "TransformExporter",
    "TransformFormat",
    "TunedGrid",
    "format_of",
    "judges_texts",
    "transforms_inputs",
]

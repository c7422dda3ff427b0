"""BitDistiller for aptq: a quantized model trained towards the original by confidence-aware self-distillation."""

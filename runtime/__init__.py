"""What goes into an app: open a bundle, run it, compare, profile. Needs numpy and onnxruntime, never torch.

import edgekit.runtime as edge

session = edge.load("shvit_digits-onnx.edge")
session.predict("digit.png")                      # [Prediction(index=7, label='7', probability=0.99..., ...), ...]
session.run({"image": array})                     # {"logits": array}
edge.generate("dhsa_bytes-onnx.edge", "A list is").text
"""

from edgekit.runtime.bundle import Bundle, Samples
from edgekit.runtime.compare import OutputComparison, compare_arrays, compare_outputs
from edgekit.runtime.datasets import Dataset, load_dataset
from edgekit.runtime.generated import Generated, Piece
from edgekit.runtime.generation import Generator, TextStream, generate, load_generator
from edgekit.runtime.kernel_library import NodeKernel
from edgekit.runtime.manifest import DimRange, Manifest, TensorSpec
from edgekit.runtime.postprocess import Prediction, softmax, top_k
from edgekit.runtime.preprocess import ImagePreprocessing
from edgekit.runtime.profiler import Profile, ProfileComparison, profile, profile_pair
from edgekit.runtime.session import Session, load
from edgekit.runtime.verification import Verification, verify

__all__ = [
    "Bundle",
    "Dataset",
    "DimRange",
    "Generated",
    "Generator",
    "ImagePreprocessing",
    "Manifest",
    "NodeKernel",
    "OutputComparison",
    "Piece",
    "Prediction",
    "Profile",
    "ProfileComparison",
    "Samples",
    "Session",
    "TensorSpec",
    "TextStream",
    "Verification",
    "compare_arrays",
    "compare_outputs",
    "generate",
    "load",
    "load_dataset",
    "load_generator",
    "profile",
    "profile_pair",
    "softmax",
    "top_k",
    "verify",
]

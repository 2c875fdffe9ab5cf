"""export: one bit-width of an artifact as a file that other tools read.

verbs       export: reads, writes, and says what was written
state_dict  values, in safetensors
onnx        the graph with its values, for ONNX Runtime and whatever else reads ONNX
openvino    the same, as OpenVINO's own two files
torch_program    a loaded model as torch.export's program

What is exported knows nothing of layers any more, and no bit-width but its own.
"""

from plyweight.exporting.verbs import ExportReport, export

__all__ = ["ExportReport", "export"]

"""From a bundle to tokens: numpy and ONNX Runtime or OpenVINO, never torch."""

"""Weight gradient of a grouped matmul: dW_g = x_g^T dy_g with float32 accumulation and result."""

from pallas_kernels.grouped_weight_gradient.gpu import grouped_weight_gradient_hopper
from pallas_kernels.grouped_weight_gradient.reference import grouped_weight_gradient_reference

__all__ = ["grouped_weight_gradient_hopper", "grouped_weight_gradient_reference"]

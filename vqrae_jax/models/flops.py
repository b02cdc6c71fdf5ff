"""Floating-point operations of layers, by formula: 2 m n k for a matmul, counted by whoever knows the layer's shape."""

from typing import NamedTuple


class Work(NamedTuple):
    """Operations of matmuls with weights, and of those without (attention), whose two inputs both need a gradient."""

    weighted: int = 0
    weightless: int = 0

    @property
    def forward(self) -> int:
        """Of the forward pass."""
        return self.weighted + self.weightless

    def backward(self, *, inputs: bool = True, weights: bool = True) -> int:
        """Of forward and backward pass together.

        Args:
          inputs: whether a gradient flows on to the inputs.
          weights: whether the weights learn.
        """
        return self.weighted * (1 + weights + inputs) + 3 * self.weightless


class QuantizerWork(NamedTuple):
    """Operations of a quantizer, per image.

    Attributes:
      into: of layers before the search.
      search: of the comparison of an image's tokens with all codes.
      out: of layers after it.
      code: of making one code from its codebook, once a call and not per image (SimVQ).
    """

    into: Work = Work()
    search: int = 0
    out: Work = Work()
    code: int = 0


def dense(inputs: int, outputs: int) -> int:
    """Of a dense layer, per token."""
    return 2 * inputs * outputs


def conv(size: int, kernel: int, inputs: int, outputs: int) -> int:
    """Of a `kernel` x `kernel` convolution with `size` x `size` outputs."""
    return size**2 * kernel**2 * dense(inputs, outputs)

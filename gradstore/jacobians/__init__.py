"""Per-example Jacobians of a classifier's logits, streamed a block of parameters at a time."""

from gradstore.jacobians.blocks import DenseBlock, EmbeddingBlock, JacobianBlock, LinearBlock, join_blocks
from gradstore.jacobians.head_blocks import LoweredBlock, OwnRowBlock
from gradstore.jacobians.jacobian_engine import JacobianEngine, JacobianStream

__all__ = [
    "DenseBlock",
    "EmbeddingBlock",
    "JacobianBlock",
    "JacobianEngine",
    "JacobianStream",
    "LinearBlock",
    "LoweredBlock",
    "OwnRowBlock",
    "join_blocks",
]

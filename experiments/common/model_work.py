"""What a prefill computes, and where its time goes on a GPU.

FLOPs of the model, not of a program: B rows of S tokens, T = B S,

    dense      2 T L f (2 (N + K) H + 3 F)   projections and SwiGLU (width F)
             + 2 B f vocab                   logits of each row's last token
    attention  4 N H L pairs                 (query, key) pairs that the mask
                                             lets through: causal work once

    MFU = FLOPs / time / matmul ceiling of the same run

Time is split by the names of the kernels that CUPTI saw. XLA has no kernel of
its own for attention: what it does of it counts as matmuls and rest.
"""

from collections.abc import Mapping
import dataclasses

from experiments.common import shapes
from paged_jax.models.config import ModelConfig

# The first match counts. Ours, cuDNN's and FlashAttention's; then writers of
# caches; then cuBLAS's, CUTLASS's and XLA's own products.
_GROUPS = {
  "attention": ("paged_", "sdpa", "flash", "fmha"),
  "writes": ("write_kv", "scatter", "dynamic_update_slice"),
  "matmuls": ("nvjet", "gemm", "cutlass", "xmma", "cublas", "splitk", "matmul"),
  "rest": ("",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """FLOPs of a prefill."""

  dense: int
  attention: int

  @property
  def flops(self) -> int:
    return self.dense + self.attention


def of_prefill(config: ModelConfig, batch: int, length: int) -> Work:
  """Returns the FLOPs of `batch` prompts of `length` tokens each."""
  c = config
  layer = shapes.Shape(
    name="prefill",
    phase="prefill",
    batch=batch,
    num_heads=c.num_heads,
    num_kv_heads=c.num_kv_heads,
    head_dim=c.head_dim,
    page_size=1,
    context=length,
    query_tokens=0,
    window=c.window,
    dtype=c.dtype,
  )
  weights = c.features * (
    2 * (c.num_heads + c.num_kv_heads) * c.head_dim + 3 * c.hidden
  )
  head = c.features * c.vocab_size
  return Work(
    dense=2 * batch * (length * c.num_layers * weights + head),
    attention=c.num_layers * layer.flops,
  )


def split(kernels: Mapping[str, tuple[float, float]]) -> dict[str, float]:
  """Returns the ms of attention, writes, matmuls and the rest.

  Args:
    kernels: {kernel name: (launches, us)}, as from `timing.kernels`.
  """
  ms = dict.fromkeys(_GROUPS, 0.0)
  for name, (_, us) in kernels.items():
    name = name.lower()
    group = next(
      group
      for group, words in _GROUPS.items()
      if any(word in name for word in words)
    )
    ms[group] += us / 1e3
  return ms


def figures(
  work: Work,
  median_ms: float,
  kernels: Mapping[str, tuple[float, float]],
  matmul_tflops: float,
) -> dict[str, float]:
  """Returns rates of a path and the split of its time.

  Args:
    work: of one call.
    median_ms: of one call, host clock.
    kernels: of one call.
    matmul_tflops: the ceiling of the run.
  """
  tflops = work.flops / median_ms / 1e9
  ms = split(kernels)
  return dict(
    dense_flops=work.dense,
    attention_flops=work.attention,
    tflops=tflops,
    matmul_tflops=matmul_tflops,
    mfu=tflops / matmul_tflops,
    kernels_ms=sum(ms.values()),
    attention_share=ms["attention"] / median_ms,
    **{f"{group}_ms": value for group, value in ms.items()},
  )


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
  """Returns the `figures` of each path as text."""
  first = next(iter(rows.values()))
  dense, attention = first["dense_flops"], first["attention_flops"]
  head = ("", "TFLOP/s", "MFU", "kernels ms", *_GROUPS, "attention/call")
  layout = "{:12}{:>10}{:>9}{:>12}" + len(_GROUPS) * "{:>11}" + "{:>16}"
  lines = [
    f"{(dense + attention) / 1e12:.3g} TFLOP a call: {dense / 1e12:.3g} of "
    f"dense products, {attention / 1e12:.3g} of causal attention; matmul "
    f"ceiling {first['matmul_tflops']:.3g} TFLOP/s",
    layout.format(*head),
  ]
  for name, f in rows.items():
    lines.append(layout.format(
      name,
      f"{f['tflops']:.1f}",
      f"{100 * f['mfu']:.1f} %",
      f"{f['kernels_ms']:.2f}",
      *(f"{f[f'{group}_ms']:.2f}" for group in _GROUPS),
      f"{100 * f['attention_share']:.1f} %",
    ))
  return "\n".join(lines)

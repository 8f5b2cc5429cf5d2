"""Training states on disk, by orbax: bit for bit what was saved.

    folder/<step>/weights    of the model: all that `load_model` reads
    folder/<step>/progress   step and optimizer
    folder/<step>/config     what the run was made of, JSON
"""

from collections.abc import Mapping
import pathlib
from typing import Any

from flax import nnx
import jax

from paged_jax.models.config import ModelConfig
from paged_jax.models.transformer import Transformer
from paged_jax.train.step import TrainState

_KEPT = 2  # latest states


class Checkpoints:
  """A folder of states, the latest few of a run."""

  def __init__(self, folder: str | pathlib.Path):
    """Opens a folder; it is made when something is saved.

    Raises:
      ImportError: orbax is not installed.
    """
    self.folder = pathlib.Path(folder).absolute()
    self._orbax = _library()

  @property
  def latest_step(self) -> int | None:
    """The step of the newest complete checkpoint, None if there is none."""
    if not self.folder.is_dir():
      return None
    with self._manager() as manager:
      return manager.latest_step()

  def set_aside(self) -> pathlib.Path | None:
    """Renames an existing folder, so that a fresh start loses nothing."""
    if not self.folder.exists():
      return None
    number = 1
    while (old := self.folder.with_suffix(f".{number}")).exists():
      number += 1
    return self.folder.rename(old)

  def save(self, state: TrainState, config: Mapping[str, Any]) -> None:
    """Saves a state under its step, and waits until the disk has it.

    Args:
      state: the state.
      config: JSON values, given back by `config`; for `load_model`, "model"
        holds the fields of `ModelConfig`.
    """
    args = self._orbax.args
    self.folder.mkdir(parents=True, exist_ok=True)
    with self._manager() as manager:
      manager.save(
        int(state.step),
        args=args.Composite(
          weights=args.StandardSave(state.weights),
          progress=args.StandardSave(_progress(state)),
          config=args.JsonSave(dict(config)),
        ),
      )
      manager.wait_until_finished()

  def config(self) -> dict[str, Any]:
    """Returns the config of the newest checkpoint.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    return self._restore(config=self._orbax.args.JsonRestore())["config"]

  def restore(self, like: TrainState) -> TrainState:
    """Returns the newest state.

    Args:
      like: a state, or one of `jax.ShapeDtypeStruct`, of the same structure.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    restored = self._restore(
      weights=self._standard(like.weights),
      progress=self._standard(_progress(like)),
    )
    return TrainState(weights=restored["weights"], **restored["progress"])

  def load_model(self) -> Transformer:
    """Returns the decoder with the newest weights.

    Raises:
      FileNotFoundError: there is no checkpoint.
    """
    config = ModelConfig(**self.config()["model"])
    graph, weights = nnx.split(
      nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    )
    restored = self._restore(weights=self._standard(weights))
    return nnx.merge(graph, restored["weights"])

  def _standard(self, like):
    return self._orbax.args.StandardRestore(
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    )

  def _restore(self, **args):
    step = self.latest_step
    if step is None:
      raise FileNotFoundError(f"there is no checkpoint in {self.folder}")
    with self._manager() as manager:
      return manager.restore(step, args=self._orbax.args.Composite(**args))

  def _manager(self):
    options = self._orbax.CheckpointManagerOptions(
      max_to_keep=_KEPT, enable_async_checkpointing=False
    )
    return self._orbax.CheckpointManager(self.folder, options=options)


def _progress(state):
  return dict(step=state.step, optimizer=state.optimizer)


def _library() -> Any:
  try:
    import orbax.checkpoint
  except ImportError as error:
    raise ImportError(
      "checkpoints need the library orbax-checkpoint: "
      "pip install 'paged_jax[train]'"
    ) from error
  return orbax.checkpoint

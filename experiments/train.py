"""Train a byte-level decoder, then generate with it through pages.

    python -m experiments.train --config=configs/train_bytes.py
    python -m experiments.train --config=configs/train_bytes.py:tiny
    python -m experiments.train --resume

Training attends within contiguous windows; generation uses the checkpoint's
weights twice, through scattered pages and over a contiguous cache, and both
must write the same tokens. Output under --workdir (default out/train/<config
name>): losses.jsonl, loss.png, generated.jsonl, checkpoints/. Ctrl-C saves a
checkpoint; --resume goes on from it as if nothing had happened, bit for bit.
Exit code 1 if the held-out loss misses config.target or the tokens differ.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from typing import Any

from absl import flags, logging
from flax import nnx
import jax
from ml_collections import config_flags
import numpy as np
import tqdm

from experiments import cli
from experiments.common import loading, shapes
from experiments.common import records as records_lib
from paged_jax.engine import contiguous, sampling
from paged_jax.engine import generate as generate_lib
from paged_jax.models.config import ModelConfig
from paged_jax.models.tokenizer import ByteTokenizer
from paged_jax.models.transformer import Transformer
from paged_jax.ops import implementations
from paged_jax.train import checkpoint, data, plot
from paged_jax.train import step as step_lib

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="A training run; default configs/train_bytes.py."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the output; default out/train/<config name>."
)
_RESUME = flags.DEFINE_bool(
  "resume", False, "Go on from the newest checkpoint in the workdir."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What to write with the trained model."""

  prompts: tuple[str, ...]
  new_bytes: int
  temperature: float
  page_size: int  # tokens
  combined: bool
  implementation: str | None
  seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a run does: all of the config, read and checked."""

  title: str
  recipe: dict[str, dict[str, Any]]  # what makes the run this very run; JSON
  data: data.ByteData
  model: ModelConfig
  optimizer: step_lib.Optimizer
  eval_every: int  # steps
  eval_batches: int
  save_every: int  # steps
  target: float  # nats a byte
  generation: Generation


def main() -> int:
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # orbax tells its every move
  config = _CONFIG.value
  plan = make_plan(config)
  workdir = pathlib.Path(_WORKDIR.value or f"out/train/{config.name}")
  return run(plan, workdir, resume=_RESUME.value)


def make_plan(config) -> Plan:
  """Reads the config; raises ValueError with one line for what is wrong."""
  cli.need(config, "model", "generate", like="configs/train_bytes.py")
  for name in ("eval_every", "eval_batches", "save_every"):
    loading.positive(name, config[name])
  for name in ("new_bytes", "page_size"):
    loading.positive(f"generate.{name}", config.generate[name])
  if config.seed < 0:
    raise ValueError(f"config.seed is {config.seed}: pass an int of at least 0")
  prompts = tuple(config.generate.prompts)
  if not prompts or not all(prompts):
    raise ValueError(f"config.generate.prompts is {prompts}: pass texts")
  if (name := config.generate.implementation) is not None:
    loading.one_of("generate.implementation", name, implementations.NAMES)
  sampling.Sampling(temperature=config.generate.temperature)
  files = [config.text] if config.text else data.shakespeare()
  tokens = data.read(files)
  text = data.ByteData(
    tokens=tokens,
    **{name: config[name] for name in ("held_out", "length", "batch", "seed")},
  )
  optimizer = step_lib.Optimizer(
    steps=config.steps,
    learning_rate=config.learning_rate,
    warmup=config.warmup,
  )
  sizes = dict(config.model, vocab_size=ByteTokenizer.vocab_size)
  known = {field.name for field in dataclasses.fields(ModelConfig)}
  if unknown := sizes.keys() - known:
    raise ValueError(f"config.model has no field {sorted(unknown)[0]!r}")
  model = ModelConfig(**sizes)
  loading.one_of("model.dtype", model.dtype, shapes.DTYPES)
  _ = model.attention  # most sizes are checked there
  for name in ("num_layers", "hidden"):
    loading.positive(f"model.{name}", getattr(model, name))
  digest = hashlib.sha256(tokens.tobytes()).hexdigest()
  return Plan(
    title=f"{config.name}: {len(files)} texts, {len(tokens) / 1e6:.2f} MB",
    recipe=dict(
      model=sizes,
      data=dict(text_sha256=digest, held_out=text.held_out,
                length=text.length, batch=text.batch, seed=text.seed),
      optimizer=dataclasses.asdict(optimizer),
    ),
    data=text,
    model=model,
    optimizer=optimizer,
    eval_every=config.eval_every,
    eval_batches=config.eval_batches,
    save_every=config.save_every,
    target=config.target,
    generation=Generation(
      **config.generate.to_dict() | dict(prompts=prompts, seed=config.seed)
    ),
  )


def run(plan: Plan, workdir: pathlib.Path, *, resume: bool = False) -> int:
  """Trains, plots, generates, prints, and returns the exit code."""
  checkpoints = checkpoint.Checkpoints(workdir / "checkpoints")
  records = records_lib.Records(workdir / "losses.jsonl")
  if resume:
    _check_recipe(plan.recipe, checkpoints.config())
  else:
    for old in (records.set_aside(), checkpoints.set_aside()):
      if old:
        print(f"an earlier run is kept as {old}")
  loss = fit(plan, checkpoints, records, resume=resume)
  if rows := sorted(records.rows(), key=lambda row: row["step"]):
    plot.losses(rows, workdir / "loss.png", plan.title)
  if loss is None:
    print("\ninterrupted: the state is saved; go on with --resume")
    return 130

  problems = []
  reached = f"held-out loss {loss:.4f} nats a byte"
  print(f"{reached}, {loss / math.log(2):.4f} bits a byte")
  if not loss <= plan.target:  # so NaN fails too
    problems.append(f"{reached}, to be reached: {plan.target}")
  problems += generate(
    checkpoints.load_model(), plan.generation, workdir / "generated.jsonl"
  )
  for name in ("losses.jsonl", "loss.png", "generated.jsonl", "checkpoints"):
    print(f"wrote {workdir / name}")
  print(f"FAIL: {'; '.join(problems)}" if problems else "PASS")
  return int(bool(problems))


def fit(
  plan: Plan,
  checkpoints: checkpoint.Checkpoints,
  records: records_lib.Records,
  *,
  resume: bool = False,
) -> float | None:
  """Trains to the last step.

  Returns:
    The held-out loss after it, nats a byte; None if Ctrl-C came before.
  """
  graph, weights = nnx.split(
    Transformer(plan.model, rngs=nnx.Rngs(plan.data.seed))
  )
  transformation = plan.optimizer.transformation()
  state = step_lib.create(weights, transformation)
  if resume:
    state = checkpoints.restore(state)
  # The state is not donated: Ctrl-C in the middle of a step must find it whole.
  take = jax.jit(
    functools.partial(
      step_lib.train_step, graph=graph, transformation=transformation
    )
  )
  loss_of = jax.jit(functools.partial(step_lib.loss, graph=graph))
  windows = plan.data.held_out_batches(plan.eval_batches)
  measure = lambda state: float(
    np.mean([loss_of(state.weights, batch) for batch in windows])
  )
  first, last = int(state.step), plan.optimizer.steps
  size = sum(x.size for x in jax.tree.leaves(weights))
  print(
    f"{plan.title}; {size / 1e6:.2f} million weights; steps {first}..{last} of "
    f"{plan.data.batch} x {plan.data.length} bytes on {loading.device()}",
    flush=True,
  )
  started, saved, known = time.perf_counter(), first, None
  bar = tqdm.tqdm(total=last, initial=first, unit="step", mininterval=1)
  with bar:
    try:
      for step in range(first, last):
        state, loss = take(state, plan.data.batch_at(step))
        done, loss = step + 1, float(loss)
        known = None
        if done % plan.eval_every == 0 or done == last:
          known = measure(state)
        records.append(
          dict(key=f"step {done}", status="ok", step=done, loss=loss,
               held_out=known, seconds=time.perf_counter() - started)
        )
        bar.update()
        shown = dict(loss=f"{loss:.3f}")
        if known is not None:
          shown["held_out"] = f"{known:.3f}"
          bar.write(f"step {done}: loss {loss:.4f}, held out {known:.4f}")
        bar.set_postfix(shown, refresh=False)
        if done % plan.save_every == 0 or done == last:
          checkpoints.save(state, plan.recipe)
          saved = done
    except KeyboardInterrupt:
      if int(state.step) > saved:
        checkpoints.save(state, plan.recipe)
      return None
  if first == last:
    return measure(state)
  print(f"trained in {time.perf_counter() - started:.0f} s")
  return known


def generate(
  model: Transformer, plan: Generation, path: pathlib.Path
) -> list[str]:
  """Writes through pages and over a contiguous cache; returns what differs."""
  words = ByteTokenizer()
  prompts = [words.encode(prompt) for prompt in plan.prompts]
  draw = dict(
    max_new_tokens=plan.new_bytes,
    eos=words.eos,
    seed=plan.seed,
  )
  options = sampling.Sampling(temperature=plan.temperature)
  # The last token is never fed back.
  pages = [
    -(-(len(prompt) + plan.new_bytes - 1) // plan.page_size)
    for prompt in prompts
  ]
  generator = generate_lib.Generator(
    model,
    num_pages=sum(pages) * (2 if plan.combined else 1),
    page_size=plan.page_size,
    num_sequences=len(prompts),
    max_pages=max(pages),
    combined=plan.combined,
    prefill_tokens=sum(map(len, prompts)),  # one prefill, as the other path
    sampling=options,
    implementation=plan.implementation,
  )
  paged = [
    completion.tokens
    for completion in generator.generate(
      prompts, permute_seed=plan.seed, **draw
    )
  ]
  other = contiguous.generate(model, prompts, sampling=options, **draw)

  records = records_lib.Records(path)
  problems, total = [], 0
  for b, (prompt, mine, theirs) in enumerate(zip(plan.prompts, paged, other)):
    text = prompt + words.decode(mine)
    print(f"--- {prompt!r}\n{text}")
    at = _first_difference(mine, theirs)
    total += len(mine)
    if at is not None:
      problems.append(f"prompt {b}: paged and contiguous differ at byte {at}")
    records.append(
      dict(key=f"prompt {b}", status="failed" if at is not None else "ok",
           prompt=prompt, text=text, tokens=mine, contiguous=theirs)
    )
  print(
    f"---\ngenerated {total} bytes through {generator.table.num_pages} "
    f"scattered pages of {plan.page_size} tokens; tokens "
    + ("DIFFER from" if problems else "identical to")
    + " those of the contiguous cache"
  )
  return problems


def _check_recipe(mine, made) -> None:
  for group, fields in mine.items():
    for name, value in fields.items():
      if (old := made.get(group, {}).get(name)) != value:
        raise ValueError(
          f"{group}: {name} is {value!r} but the checkpoint was made with "
          f"{old!r}: --resume goes on with the same run only; start without it"
        )


def _first_difference(mine, theirs) -> int | None:
  if mine == theirs:
    return None
  pairs = enumerate(zip(mine, theirs))
  return next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))


if __name__ == "__main__":
  cli.run(main, config="configs/train_bytes.py")

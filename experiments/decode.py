"""Autoregressive decoding through pages, text in and text out.

    python -m experiments.decode --config=configs/decode.py
    python -m experiments.decode --config=configs/decode.py:tiny --verbose
    python -m experiments.decode --config.combined=true

Prefill first, then the loop slot mapping -> table -> step -> sample -> advance
until EOS or the limit; the batch is ragged. Runs once to compile, then again,
observed. --verbose prints each step's positions, slots and physical pages.
Exit code 1 if a program was compiled after the warm-up.
"""

import json
import pathlib

from absl import flags
from ml_collections import config_flags

from experiments import cli
from experiments.common import decoding, loading, records
from paged_jax.models import tokenizer


def main() -> int:
  values = flags.FLAGS
  return run(values.config, pathlib.Path(values.workdir), values.verbose)


def run(config, workdir: pathlib.Path, verbose: bool = False) -> int:
  """Decodes, prints, writes the JSONL, and returns the exit code."""
  cli.need(config, "model", "max_new_tokens", like="configs/decode.py")
  loaded = loading.load(config.model, seed=config.seed)
  words = loaded.tokenizer
  if words is None:
    vocab = loaded.model.config.vocab_size
    prompts = loading.random_prompts(config.lengths, vocab, config.seed)
  else:
    system = config.system
    if system is None and config.model.weights == "smollm2":
      system = tokenizer.SMOLLM2_SYSTEM
    prompts = [
      words.encode(tokenizer.chat_prompt(x, system or ""))
      for x in config.prompts
    ]
  lengths = [len(prompt) for prompt in prompts]
  if not lengths:
    name = "prompts" if words else "lengths"
    raise ValueError(f"config.{name} is empty: pass an entry for each row")
  generator = decoding.make_generator(loaded.model, prompts, config)
  workdir.mkdir(parents=True, exist_ok=True)
  print(
    f"{loaded.title}, {config.model.dtype} on {loading.device()}: prompts of "
    f"{', '.join(map(str, lengths))} tokens, pages of {config.page_size}, "
    f"{'combined' if config.combined else 'separate'} table",
    flush=True,
  )
  eos = words.eos if words else ()
  result = decoding.run(generator, prompts, config, eos)
  if verbose:
    for i, step in enumerate(result.steps):
      print(decoding.describe_step(i, step))
  texts = []
  for b, completion in enumerate(result.completions):
    texts.append(words.decode(completion.tokens) if words else None)
    text = repr(texts[-1]) if words else " ".join(map(str, completion.tokens))
    asked = f" {config.prompts[b]!r}" if words else ""
    print(f"row {b}{asked}: {text} ({completion.finished_by})")
  figures = decoding.summary(result, prompts, config)
  print(decoding.describe(figures))

  path = workdir / f"{pathlib.Path(config.name).name}.jsonl"
  with records.fresh(path) as log:
    for i, step in enumerate(result.steps):
      log.write(json.dumps(dict(step=i) | step.as_dict()) + "\n")
    rows = [
      dict(prompt=lengths[b], tokens=completion.tokens, text=texts[b],
           finished_by=completion.finished_by)
      for b, completion in enumerate(result.completions)
    ]
    end = dict(summary=figures, model=loaded.title, rows=rows,
               device=loading.device(), config=config.to_dict())
    log.write(json.dumps(end) + "\n")
  print(f"wrote {path}")
  if result.recompiled:
    print(f"FAIL: {result.recompiled} programs compiled after the warm-up")
    return 1
  return 0


if __name__ == "__main__":
  # Not above: a process that imports two mains would define them twice.
  config_flags.DEFINE_config_file("config")
  flags.DEFINE_bool("verbose", False, "Print every step.")
  flags.DEFINE_string(
    "workdir", "out/decode", "Folder for <config name>.jsonl."
  )
  cli.run(main, config="configs/decode.py")

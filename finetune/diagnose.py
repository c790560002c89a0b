r"""Say whether a pipeline can learn, and what its curves amount to.

One batch is learned by heart: what cannot do that is broken, what can underfits for another reason. Ends in one
sentence with its numbers.

Example:

  python -m finetune.diagnose task=contrastive_alignment shards=out/mica_t1 task.function.shards=out/mica_rest \
      encoder=scratch diagnose.curves=out/alignment run.folder=out/diagnosis

Required: task=<one that can be diagnosed>  shards=<shard set>  encoder=<as for python -m finetune>  run.folder=<folder>
Also:     diagnose.curves=<run folder, or file.csv with columns train and validation>
          and everything of python -m finetune: task, data.*

Result: <run.folder>/diagnosis.txt
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.entry import Command, main

if TYPE_CHECKING:
    from finetune.config import DiagnoseConfig

FILE = "diagnosis.txt"


def run(config: DiagnoseConfig) -> None:
    """Writes the verdict and prints it."""
    from cluster.storage.stores import store_for
    from finetune.tasks import task_module

    text = task_module(config.task).diagnose(config)
    store_for(config.run.folder).put(FILE, f"{text}\n".encode())
    print(f"\n{text}")


def validate(config: DiagnoseConfig) -> list[str]:
    """All problems of the task, and of the numbers here."""
    from finetune.tasks import task_module

    module = task_module(config.task)
    if not hasattr(module, "diagnose"):
        return [f"task: {config.task['name']} cannot be diagnosed; use contrastive_alignment"]
    positive = {"num_steps": config.diagnose.num_steps, "learning_rate": config.diagnose.learning_rate}
    problems = [f"diagnose.{key}: {value}; must be above 0" for key, value in positive.items() if value <= 0]
    return problems + module.validate(config)


def plan(config: DiagnoseConfig) -> str:
    """What would happen."""
    return (
        f"{config.diagnose.num_steps} steps on one batch of {config.data.batch_size}, once by MSE and once by InfoNCE"
        + (f"; the curves of {config.diagnose.curves}" if config.diagnose.curves else "")
    )


def command() -> Command[DiagnoseConfig]:
    from finetune.config import DiagnoseConfig

    return Command(DiagnoseConfig, run, plan, validate)


if __name__ == "__main__":
    main("finetune.diagnose", __doc__, command)

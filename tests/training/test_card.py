"""A model card says all that a reader must know before using a model."""

from __future__ import annotations

from dataclasses import replace

from training.registry.card import PHANTOM, About, TrainingSet, model_card

FACTS = {"subjects": "train 14, test 10", "sites": "2: A, B", "repetition time": "2 s", "alignment": "affine"}
ABOUT = About(
    what="A model that says ADHD or control from one BOLD run.",
    use="Research on groups.",
    limits="Not a diagnosis.",
    sets=[TrainingSet("adhd200", "s3://brains/adhd", "abc123", FACTS, is_phantom=False)],
)
RESULTS = [["", "AUROC", ""], ["fine-tuned model", "0.700 [0.600, 0.800]", "step 4"], ["site alone", "0.500", "no|ne"]]
CARD = """\
# adhd@candidate

A model that says ADHD or control from one BOLD run.

## Intended use

Research on groups.

## Limits

Not a diagnosis.

## Training data

|  | adhd200 |
| --- | --- |
| location | s3://brains/adhd |
| fingerprint | abc123 |
| subjects | train 14, test 10 |
| sites | 2: A, B |
| repetition time | 2 s |
| alignment | affine |

The weights have seen 14 subjects, of earlier training too; seen_subjects.txt has their hashes.

## Results

The fine-tuned model is better than site alone.

|  | AUROC |  |
| --- | --- | --- |
| fine-tuned model | 0.700 [0.600, 0.800] | step 4 |
| site alone | 0.500 | no/ne |

Scored on 10 subjects of the final split; brackets are bootstrap intervals over subjects.

## How to load

```python
import callosum
model = callosum.load("models:/adhd@candidate")  # a torch module; model.embed(paths) embeds scans

import mlflow
model = mlflow.pyfunc.load_model("models:/adhd@candidate")  # without this repository
```

```bash
mlflow models serve --model-uri models:/adhd@candidate --env-manager local
```

## Licence

Code: Apache-2.0. The weights were learned from the scans named above: the terms under which those may be used hold \
for the weights too.
"""


def card(about: About = ABOUT, num_seen: int | None = 14, model: str = "models:/adhd@candidate") -> str:
    verdict = "The fine-tuned model is better than site alone."
    return model_card(about, model=model, verdict=verdict, results=RESULTS, num_tested=10, num_seen=num_seen)


def test_a_card_of_known_numbers_is_this_text() -> None:
    assert card() == CARD


def test_a_phantoms_card_says_so_in_its_first_line_and_a_second_set_is_a_second_column() -> None:
    made = replace(ABOUT.sets[0], name="phantom", facts={"subjects": "train 3"}, is_phantom=True)
    text = card(replace(ABOUT, sets=[ABOUT.sets[0], made]))
    assert text.splitlines()[0] == PHANTOM
    assert "| subjects | train 14, test 10 | train 3 |" in text
    assert "| sites | 2: A, B | – |" in text


def test_a_card_of_a_folder_without_seen_subjects_says_what_is_unknown() -> None:
    text = card(num_seen=None, model="out/run/bundle")
    assert "It is not known which subjects the weights have seen." in text
    assert 'callosum.load("out/run/bundle")' in text
    assert "mlflow" not in text

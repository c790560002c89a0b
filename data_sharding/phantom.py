"""Write a synthetic study with a known truth.

T1w and rest fMRI in MNI space, as a folder of BIDS derivatives.

Example (220 subjects on a 6 mm grid, half a minute on two cores):
  python -m data_sharding.phantom out=out/phantom

Required overrides:
  out=<folder>         where the folder is written

Often used:
  num_subjects=220     subject k does not depend on this number
  spacing_mm=6.0       voxel size of the BOLD (t1_spacing_mm: of the T1), on a grid with the FSL grid's corner
  effect_size=1.0      0: no array depends on the diagnosis;  equal_prevalence=true: nor does the site
  seed=0               other people of the same population
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.entry import Command, main

if TYPE_CHECKING:
    from data_sharding.phantoms.study.config import PhantomConfig


def run(config: PhantomConfig) -> None:
    """Writes the folder and says what comes next."""
    from data_sharding.hints import after_phantom
    from data_sharding.phantoms.study.write import write_phantom

    write_phantom(config)
    print(after_phantom(config))


def plan(config: PhantomConfig) -> str:
    """Returns what would be written."""
    from brain_models.space import fsl_grid

    _, shape = fsl_grid(config.spacing_mm)
    _, t1_shape = fsl_grid(config.t1_spacing_mm)
    sites = ", ".join(f"{site.name} (TR {site.repetition_time_s:g} s)" for site in config.sites)
    return (
        f"{config.num_subjects} subjects into {config.out}: BOLD {shape} x {config.num_frames} frames, T1 {t1_shape}, "
        f"sites {sites}, effect size {config.effect_size:g}, {config.num_processes} processes"
    )


def command() -> Command:
    from cluster.config import Needs
    from data_sharding.phantoms.study.config import PhantomConfig, validate_phantom

    return Command(PhantomConfig, run, plan, validate_phantom, lambda config: Needs(results=config.out))


if __name__ == "__main__":
    main("data_sharding.phantom", __doc__, command)

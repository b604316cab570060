"""What a recipe's parts must agree on, beyond what each part checks alone: one small function for each rule.

Only what can be known without loading anything is checked here; what needs the data, the backbone or the
hardware is checked where those are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hf_finetune.checks import backbone, data, strategy, training
from hf_finetune.checks.conflict import Conflict
from hf_finetune.recipe_spec import Recipe

CHECKS: tuple[Callable[[Recipe], Iterator[Conflict]], ...] = (
    data.shipped_names,
    data.modalities_agree,
    data.augmentations_fit_the_modality,
    data.decoding_needs_images,
    data.only_images_go_to_the_accelerator,
    data.mixing_needs_pairs,
    data.mixing_needs_classes,
    data.splits_exist,
    data.fraction_needs_no_validation_split,
    data.streams_are_read_once_through,
    training.smoothing_needs_classes,
    training.weights_need_classes,
    training.run_has_a_length,
    training.micro_batches_fill_the_batch,
    training.micro_batches_hold_a_text,
    training.metrics_fit_the_labels,
    training.better_is_known,
    training.evaluations_happen,
    training.patience_can_run_out,
    training.warmup_suits_the_schedule,
    training.trackers_are_known,
    strategy.phases_fill_the_run,
    strategy.both_stages_happen,
    strategy.solvers_have_features,
    strategy.a_solver_takes_one_step,
    strategy.solved_heads_are_measured,
    backbone.frozen_layers_are_pretrained,
    backbone.quantised_weights_stay,
    backbone.remote_code_is_pinned,
    backbone.pickles_are_files,
    backbone.revisions_are_of_the_hub,
)


def conflicts(recipe: Recipe) -> list[Conflict]:
    """Return everything in a recipe that does not fit together."""
    return [conflict for check in CHECKS for conflict in check(recipe)]

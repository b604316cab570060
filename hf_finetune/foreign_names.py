"""What other tools call what a recipe says, so that an error can name ours."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    **dict.fromkeys(("learning_rate", "base_lr", "max_lr", "lr_rate"), "optimizer.lr"),
    **dict.fromkeys(("optim", "opt", "optimiser"), "optimizer"),
    **dict.fromkeys(("betas", "eps", "adam_beta1", "adam_beta2", "adam_epsilon"), "optimizer.options"),
    **dict.fromkeys(("num_train_epochs", "num_epochs", "n_epochs", "max_epochs"), "training.epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "num_train_steps", "total_steps"), "training.steps"),
    **dict.fromkeys(("train_batch_size", "bs", "global_batch_size"), "training.batch_size"),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_batch_size"), "training.micro_batch_size"),
    **dict.fromkeys(("torch_compile", "torchcompile"), "training.compile"),
    **dict.fromkeys(
        ("max_tokens", "max_tokens_per_batch", "tokens_per_batch"), "training.micro_batch_tokens"
    ),
    **dict.fromkeys(("cache_images", "cache_ram", "cache_mode"), "data.cache"),
    **dict.fromkeys(("fp16", "bf16", "tf32", "amp", "mixed_precision"), "training.precision"),
    **dict.fromkeys(
        ("max_grad_norm", "grad_clip", "clip_grad", "gradient_clip_val", "gradient_clipping"),
        "training.clip_norm",
    ),
    **dict.fromkeys(("label_smoothing_factor", "smoothing"), "training.label_smoothing"),
    "ema_decay": "training.ema.decay",
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "warmup_epochs", "num_warmup_steps"), "schedule.warmup"),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler", "sched"), "schedule"),
    **dict.fromkeys(
        ("model", "model_name", "model_name_or_path", "model_id", "arch", "checkpoint", "encoder"),
        "backbone.id",
    ),
    **dict.fromkeys(("drop_path_rate", "attn_implementation", "dropout"), "backbone.options"),
    **dict.fromkeys(
        ("dataset", "dataset_name", "datasets", "data_dir", "data_path", "train_file", "dataset_path"),
        "data.path",
    ),
    **dict.fromkeys(("dataset_config_name", "dataset_config"), "data.config"),
    **dict.fromkeys(("validation_split", "val_split", "test_size", "eval_split", "val"), "data.validation"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), "data.workers"),
    **dict.fromkeys(("max_seq_length", "max_seq_len"), "data.max_length"),
    **dict.fromkeys(("max_train_samples", "limit"), "data.max_samples"),
    **dict.fromkeys(("shuffle_buffer_size", "buffer_size"), "data.shuffle_buffer"),
    **dict.fromkeys(("problem_type", "multi_label", "label_type"), "data.labels"),
    **dict.fromkeys(("class_weight", "weights"), "data.class_weights"),
    **dict.fromkeys(("image_column", "image_column_name"), "data.columns.image"),
    **dict.fromkeys(("text_column", "text_column_name", "text_column_names"), "data.columns.text"),
    **dict.fromkeys(("label_column", "label_column_name"), "data.columns.label"),
    **dict.fromkeys(("augmentation", "augmentations", "transforms", "aug"), "augment"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "eval_steps", "eval_every"), "monitor.evaluate"),
    "metric_for_best_model": "monitor.metric",
    "greater_is_better": "monitor.mode",
    **dict.fromkeys(("early_stopping_patience", "early_stop"), "monitor.early_stopping"),
    **dict.fromkeys(("report_to", "logger", "loggers", "tracker"), "trackers"),
    **dict.fromkeys(("output_dir", "save_dir", "out_dir"), "output"),
    **dict.fromkeys(("base", "inherit", "defaults", "<<"), "extends"),
}
"""Key of another tool -> our key."""

DERIVED: dict[str, str] = {
    **dict.fromkeys(
        ("gradient_accumulation_steps", "accumulate", "accumulation"),
        "accumulation follows from training.batch_size and training.micro_batch_size: remove this key",
    ),
    **dict.fromkeys(
        ("num_labels", "num_classes", "classes", "label_names"),
        "the classes come from the data: remove this key",
    ),
    **dict.fromkeys(
        ("image_size", "img_size", "resolution", "mean", "std", "interpolation", "tokenizer"),
        "the input's form comes with the checkpoint: remove this key",
    ),
    **dict.fromkeys(
        ("device", "devices", "gpus", "num_processes"),
        "devices are chosen by `accelerate launch`: remove this key",
    ),
    **dict.fromkeys(
        ("freeze", "freeze_backbone", "frozen", "unfreeze", "finetune", "trainable"),
        "what learns is said by the strategy: frozen, gradual, full …, or phases",
    ),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint"), "resuming is the command's --resume: remove this key"
    ),
}
"""Key of another tool -> why a recipe has none, and what to do."""

ALIASES: dict[str, dict[str, str]] = {
    "strategy": {
        **dict.fromkeys(("linear_probe", "probe", "head", "feature_extraction", "freeze"), "frozen"),
        **dict.fromkeys(("fine_tune", "finetune", "fine_tuning", "finetuning", "all"), "full"),
        **dict.fromkeys(("ulmfit", "unfreeze", "gradual_unfreezing"), "gradual"),
        **dict.fromkeys(("llrd", "layer_decay", "layerwise"), "{name: discriminative, layer_decay: auto}"),
        "gradual_plateau": "{name: gradual, every: plateau}",
        "batch_norm": "norms",
    },
    "schedule": {
        **dict.fromkeys(("cosine_annealing", "cosine_with_warmup", "sgdr"), "cosine"),
        **dict.fromkeys(("cosine_with_restarts", "cosine_annealing_warm_restarts"), "cosine_restarts"),
        "plateau": "reduce_on_plateau",
        "wsd": "warmup_stable_decay",
        "stlr": "slanted_triangular",
        "constant_with_warmup": "constant",
        "none": "constant",
    },
    "augment": {"hflip": "horizontal_flip", "flip": "horizontal_flip", "vflip": "vertical_flip"},
}
"""Section -> another name for something in its table -> what to write."""

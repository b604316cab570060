"""Broken recipes, each with the exact text that answers it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Broken:
    """A recipe.yaml (and files beside it) that `load_recipe` refuses with `message`."""

    name: str
    recipe: str
    message: str
    overrides: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)


BROKEN = [
    Broken(
        "empty file",
        "",
        """
        recipe.yaml:1
          the file is empty
          a recipe names at least a strategy, such as `strategy: frozen`
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "only comments",
        """
        # a recipe to come
        """,
        """
        recipe.yaml:1
          the file is empty
          a recipe names at least a strategy, such as `strategy: frozen`
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "a list",
        """
        - strategy: frozen
        """,
        """
        recipe.yaml:1
          given [{strategy: frozen}]; a recipe is a mapping of keys to values
          for example `strategy: frozen`
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "a bare word",
        """
        frozen
        """,
        """
        recipe.yaml:1
          given frozen; a recipe is a mapping of keys to values
          for example `strategy: frozen`
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "repeated keys",
        """
        strategy: frozen
        training:
          epochs: 3
          batch_size: 8
          epochs: 5
        strategy: full
        """,
        """
        recipe.yaml:5: training.epochs
          repeated key, first at recipe.yaml:3
          keep one of the two
        recipe.yaml:6: strategy
          repeated key, first at recipe.yaml:1
          keep one of the two
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "tab",
        """
        strategy: frozen
        training:
        \tepochs: 3
        """,
        """
        recipe.yaml:3
          given epochs: 3; not YAML: a tab in the indent
          indent with spaces
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "two colons",
        """
        strategy: frozen
        output: runs: mine
        """,
        """
        recipe.yaml:2
          given output: runs: mine; not YAML: a second ': ' on one line
          put text that contains ': ' in quotes
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "indent",
        """
        strategy: frozen
          training:
            epochs: 3
        """,
        """
        recipe.yaml:2
          given training:; not YAML: the line does not continue the one above
          align it with its neighbours, and check the line above for a missing ':'
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "open bracket",
        """
        strategy: frozen
        augment: [mixup, cutmix
        training: {epochs: 3}
        """,
        """
        recipe.yaml:2
          given augment: [mixup, cutmix; not YAML: a bracket that is not closed, or a missing comma
          close it with ] or }, and put text that holds brackets or commas in quotes
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "open quote",
        """
        strategy: 'frozen
        training: {epochs: 3}
        """,
        """
        recipe.yaml:1
          given strategy: 'frozen; not YAML: a quote that is not closed
          close it
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "slice in braces",
        """
        strategy: frozen
        data: {path: user/birds, train: train[:90%]}
        """,
        """
        recipe.yaml:2
          given data: {path: user/birds, train: train[:90%]}; not YAML: a bracket that is not closed, or a missing comma
          close it with ] or }, and put text that holds brackets or commas in quotes
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "undefined alias",
        """
        strategy: *mine
        """,
        """
        recipe.yaml:1
          given strategy: *mine; not YAML: an alias (*name) without its anchor (&name)
          put text that starts with * in quotes
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "tag",
        """
        strategy: frozen
        output: !!python/name:os.system x
        """,
        """
        recipe.yaml:2: output
          given the tag !!python/name:os.system, which a recipe has no use for
          remove it
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "two documents",
        """
        strategy: frozen
        ---
        strategy: full
        """,
        """
        recipe.yaml:2
          given ---; not YAML: a second document begins here
          keep one document in a file
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "key that is a list",
        """
        strategy: frozen
        ? [a, b]
        : 3
        """,
        """
        recipe.yaml:2
          a key is a word, not a list or a mapping
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "no strategy",
        """
        training: {epochs: 3}
        """,
        """
        recipe.yaml:1: strategy
          missing; allowed: scratch, full, frozen, discriminative, gradual, lp_ft, surgical, bitfit, norms, lora, dora, rslora, pissa, lora_plus, adalora, ia3, vera, oft, boft, loha, lokr, ln_tuning, peft or phases
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "misspelt key",
        """
        strategy: frozen
        training:
          epoch: 3
        """,
        """
        recipe.yaml:3: training.epoch
          unknown key, given 3
          did you mean 'epochs'?
          allowed: epochs, steps, batch_size, micro_batch_size, micro_batch_tokens, precision, compile, clip_norm, label_smoothing, ema, gradient_checkpointing, checkpoint, max_hours, reload_check, seed
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "misspelt section",
        """
        strategy: frozen
        trainning: {epochs: 3}
        """,
        """
        recipe.yaml:2: trainning
          unknown key, given {epochs: 3}
          did you mean 'training'?
          allowed: extends, task, backbone, data, augment, strategy, optimizer, schedule, training, cache, monitor, trackers, output, hub
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "a cache without a size",
        """
        strategy: frozen
        cache: {views: 0, budget: 8, dtype: int8, place: /tmp}
        """,
        """
        recipe.yaml:2: cache.views
          given 0; allowed: null or a whole number of at least 1
        recipe.yaml:2: cache.budget
          given 8; allowed: a size (8GB)
          a size is a number above 0 and its unit (B, KB, MB, GB, TB), such as 8GB
        recipe.yaml:2: cache.dtype
          given int8; allowed: fp32, fp16, bf16 or null
        recipe.yaml:2: cache.place
          unknown key, given /tmp
          allowed: views, budget, dtype
        4 problems in recipe.yaml
        """,
    ),
    Broken(
        "section by almost its name",
        """
        strategy: frozen
        train:
          epochs: 3
        """,
        """
        recipe.yaml:2: train
          unknown key, given {epochs: 3}
          did you mean 'training'?
          allowed: extends, task, backbone, data, augment, strategy, optimizer, schedule, training, cache, monitor, trackers, output, hub
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "key of another section",
        """
        strategy: frozen
        epochs: 3
        lr: 1e-3
        patience: 2
        """,
        """
        recipe.yaml:2: epochs
          unknown key, given 3
          it belongs under training:
        recipe.yaml:3: lr
          unknown key, given 1e-3
          it belongs under optimizer:
        recipe.yaml:4: patience
          unknown key, given 2
          it belongs under strategy:, schedule: or monitor.early_stopping:
        3 problems in recipe.yaml
        """,
    ),
    Broken(
        "keys of transformers",
        """
        strategy: frozen
        model_name_or_path: bert-base-uncased
        num_train_epochs: 3
        learning_rate: 2e-5
        per_device_train_batch_size: 8
        gradient_accumulation_steps: 4
        fp16: true
        report_to: wandb
        """,
        """
        recipe.yaml:2: model_name_or_path
          unknown key, given bert-base-uncased
          here it is called backbone.id
        recipe.yaml:3: num_train_epochs
          unknown key, given 3
          here it is called training.epochs
        recipe.yaml:4: learning_rate
          unknown key, given 2e-5
          here it is called optimizer.lr
        recipe.yaml:5: per_device_train_batch_size
          unknown key, given 8
          here it is called training.micro_batch_size
        recipe.yaml:6: gradient_accumulation_steps
          unknown key, given 4
          accumulation follows from training.batch_size and training.micro_batch_size: remove this key
        recipe.yaml:7: fp16
          unknown key, given true
          here it is called training.precision
        recipe.yaml:8: report_to
          unknown key, given wandb
          here it is called trackers
        7 problems in recipe.yaml
        """,
    ),
    Broken(
        "keys of timm",
        """
        strategy: frozen
        model: resnet18
        opt: sgd
        sched: cosine
        num_classes: 10
        img_size: 224
        freeze: true
        """,
        """
        recipe.yaml:2: model
          unknown key, given resnet18
          here it is called backbone.id
        recipe.yaml:3: opt
          unknown key, given sgd
          here it is called optimizer
        recipe.yaml:4: sched
          unknown key, given cosine
          here it is called schedule
        recipe.yaml:5: num_classes
          unknown key, given 10
          the classes come from the data: remove this key
        recipe.yaml:6: img_size
          unknown key, given 224
          the input's form comes with the checkpoint: remove this key
        recipe.yaml:7: freeze
          unknown key, given true
          what learns is said by the strategy: frozen, gradual, full …, or phases
        6 problems in recipe.yaml
        """,
    ),
    Broken(
        "unknown key",
        """
        strategy: frozen
        monitor: {colour: red}
        """,
        """
        recipe.yaml:2: monitor.colour
          unknown key, given red
          allowed: metric, mode, metrics, evaluate, early_stopping
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "option of another strategy",
        """
        strategy: {name: full, layer_decay: 0.75}
        """,
        """
        recipe.yaml:1: strategy.layer_decay
          unknown key, given 0.75
          layer_decay is an option of discriminative, not of full
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "option of another augmentation",
        """
        strategy: frozen
        augment: [{name: cutmix, degrees: 30}]
        """,
        """
        recipe.yaml:2: augment.0.degrees
          unknown key, given 30
          degrees is an option of rotation, not of cutmix
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "attribute name",
        """
        strategy:
          phases:
            - {train: head, for_: 1 epoch}
            - {train: all}
        """,
        """
        recipe.yaml:3: strategy.phases.0.for_
          unknown key, given 1 epoch
          did you mean 'for'?
          allowed: train, for, until, lr, backbone_lr, layer_decay, rates, batch_norm, solver
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "wrong types",
        """
        strategy: frozen
        training:
          epochs: many
          batch_size: 32.5
          seed: null
          clip_norm: true
          ema: true
        """,
        """
        recipe.yaml:3: training.epochs
          given many; allowed: null or a number above 0
        recipe.yaml:4: training.batch_size
          given 32.5; allowed: a whole number of at least 1
        recipe.yaml:5: training.seed
          given null; allowed: a whole number of at least 0
          leave the key out for its default
        recipe.yaml:6: training.clip_norm
          given true; allowed: null or a number above 0
        recipe.yaml:7: training.ema
          given true; allowed: null or a section with decay
        5 problems in recipe.yaml
        """,
    ),
    Broken(
        "out of range",
        """
        strategy: frozen
        training:
          epochs: 0
          batch_size: -4
          label_smoothing: 1
        backbone: {min_loaded: 90}
        optimizer: {lr: -1e-3, momentum: 1}
        """,
        """
        recipe.yaml:3: training.epochs
          given 0; allowed: null or a number above 0
        recipe.yaml:4: training.batch_size
          given -4; allowed: a whole number of at least 1
        recipe.yaml:5: training.label_smoothing
          given 1; allowed: a number of at least 0 and below 1
        recipe.yaml:6: backbone.min_loaded
          given 90; allowed: a number from 0 to 1
        recipe.yaml:7: optimizer.lr
          given -1e-3; allowed: auto or a number above 0
        recipe.yaml:7: optimizer.momentum
          given 1; allowed: a number of at least 0 and below 1
        6 problems in recipe.yaml
        """,
    ),
    Broken(
        "quoted number",
        """
        strategy: frozen
        optimizer: {lr: '1e-3'}
        """,
        """
        recipe.yaml:2: optimizer.lr
          given '1e-3'; allowed: auto or a number above 0
          without the quotes it is a number: 1e-3
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "not quoted text",
        """
        strategy: frozen
        backbone: {id: user/birds, revision: 20240131}
        """,
        """
        recipe.yaml:2: backbone.revision
          given 20240131; allowed: null or text
          in quotes it is text: '20240131'
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "yes is text",
        """
        strategy: frozen
        backbone: {pretrained: yes}
        """,
        """
        recipe.yaml:2: backbone.pretrained
          given yes; allowed: true or false
          write true
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "unknown choice",
        """
        strategy: frozen
        training: {precision: bfloat16}
        data: {labels: multilabel, on_error: ignore}
        """,
        """
        recipe.yaml:2: training.precision
          given bfloat16; allowed: auto, fp32, tf32, bf16 or fp16
          did you mean 'bf16'?
        recipe.yaml:3: data.labels
          given multilabel; allowed: single, multi or regression
          did you mean 'multi'?
        recipe.yaml:3: data.on_error
          given ignore; allowed: stop or skip
        3 problems in recipe.yaml
        """,
    ),
    Broken(
        "infinite",
        """
        strategy: frozen
        optimizer: {lr: .inf}
        training: {clip_norm: .nan}
        """,
        """
        recipe.yaml:2: optimizer.lr
          given .inf; allowed: auto or a number above 0
        recipe.yaml:3: training.clip_norm
          given .nan; allowed: null or a number above 0
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "empty section",
        """
        strategy: frozen
        training:
        epochs: 3
        """,
        """
        recipe.yaml:2: training
          given null; allowed: a section with epochs, steps, batch_size, micro_batch_size, micro_batch_tokens, precision, compile, clip_norm, label_smoothing, ema, gradient_checkpointing, checkpoint, max_hours, reload_check, seed
          remove the line, or write keys below it
        recipe.yaml:3: epochs
          unknown key, given 3
          it belongs under training:
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "section for a value",
        """
        strategy: frozen
        training: 3
        data: {path: {train: a.csv}}
        """,
        """
        recipe.yaml:2: training
          given 3; allowed: a section with epochs, steps, batch_size, micro_batch_size, micro_batch_tokens, precision, compile, clip_norm, label_smoothing, ema, gradient_checkpointing, checkpoint, max_hours, reload_check, seed
        recipe.yaml:3: data.path
          given {train: a.csv}; allowed: text or a list of texts, not empty
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "value for a section",
        """
        strategy: frozen
        monitor: {early_stopping: 3}
        """,
        """
        recipe.yaml:2: monitor.early_stopping
          given 3; allowed: null or a section with patience, min_delta
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "validation fraction",
        """
        strategy: frozen
        data: {path: user/birds, validation: 1.5}
        """,
        """
        recipe.yaml:2: data.validation
          given 1.5; allowed: auto, a split name or a fraction of train above 0 and below 1
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "three text columns",
        """
        strategy: frozen
        data: {path: user/pairs, columns: {text: [a, b, c]}}
        """,
        """
        recipe.yaml:2: data.columns.text
          given [a, b, c]; allowed: text or a list of 1 to 2 texts
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "class weights",
        """
        strategy: frozen
        data: {path: user/birds, class_weights: {robin: heavy, wren: 0}}
        """,
        """
        recipe.yaml:2: data.class_weights.robin
          given heavy; allowed: a number above 0
        recipe.yaml:2: data.class_weights.wren
          given 0; allowed: a number above 0
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "durations",
        """
        strategy: {name: gradual, every: 3}
        monitor: {evaluate: 2 hours}
        schedule: {name: linear, warmup: 0.5 steps}
        """,
        """
        recipe.yaml:1: strategy.every
          given 3; allowed: plateau, N epochs, N steps or N%
          for example 3 epochs
        recipe.yaml:2: monitor.evaluate
          given 2 hours; allowed: N epochs, N steps or N%
        recipe.yaml:3: schedule.warmup
          given 0.5 steps; allowed: auto, null, N epochs, N steps or N%
          a number of steps is whole
        3 problems in recipe.yaml
        """,
    ),
    Broken(
        "more durations",
        """
        strategy: {name: lp_ft, probe: 0 epochs}
        schedule: {name: linear, warmup: 120%}
        """,
        """
        recipe.yaml:1: strategy.probe
          given 0 epochs; allowed: auto, N epochs, N steps or N%
          a duration is longer than zero
        recipe.yaml:2: schedule.warmup
          given 120%; allowed: auto, null, N epochs, N steps or N%
          a duration is at most 100% of the run
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "rates",
        """
        strategy: {name: discriminative, backbone_lr: slow}
        """,
        """
        recipe.yaml:1: strategy.backbone_lr
          given slow; allowed: auto, null, a number of at least 0 (3e-4) or a multiple of the base rate (0.1x)
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "unknown strategy",
        """
        strategy: frozn
        """,
        """
        recipe.yaml:1: strategy.name
          given frozn; allowed: scratch, full, frozen, discriminative, gradual, lp_ft, surgical, bitfit, norms, lora, dora, rslora, pissa, lora_plus, adalora, ia3, vera, oft, boft, loha, lokr, ln_tuning, peft or phases
          did you mean 'frozen'?
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "strategy of other tools",
        """
        strategy: linear_probe
        """,
        """
        recipe.yaml:1: strategy.name
          given linear_probe; allowed: scratch, full, frozen, discriminative, gradual, lp_ft, surgical, bitfit, norms, lora, dora, rslora, pissa, lora_plus, adalora, ia3, vera, oft, boft, loha, lokr, ln_tuning, peft or phases
          here it is called frozen
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "recipe name for a strategy",
        """
        strategy: gradual_plateau
        """,
        """
        recipe.yaml:1: strategy.name
          given gradual_plateau; allowed: scratch, full, frozen, discriminative, gradual, lp_ft, surgical, bitfit, norms, lora, dora, rslora, pissa, lora_plus, adalora, ia3, vera, oft, boft, loha, lokr, ln_tuning, peft or phases
          here it is called {name: gradual, every: plateau}
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "unknown schedule",
        """
        strategy: full
        schedule: {name: cosine_anealing, floor: 0.1}
        """,
        """
        recipe.yaml:2: schedule.name
          given cosine_anealing; allowed: constant, linear, cosine, cosine_restarts, polynomial, one_cycle, slanted_triangular, warmup_stable_decay or reduce_on_plateau
          here it is called cosine
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "unknown augmentation",
        """
        strategy: full
        augment: [horizontal_flip, hflip, {name: rand_augmentation}]
        """,
        """
        recipe.yaml:2: augment.1.name
          given hflip; allowed: random_resized_crop, random_crop, horizontal_flip, vertical_flip, rotation, color_jitter, rand_augment, trivial_augment, random_erasing, mixup, cutmix, word_dropout or word_swap
          here it is called horizontal_flip
        recipe.yaml:2: augment.2.name
          given rand_augmentation; allowed: random_resized_crop, random_crop, horizontal_flip, vertical_flip, rotation, color_jitter, rand_augment, trivial_augment, random_erasing, mixup, cutmix, word_dropout or word_swap
          did you mean 'rand_augment'?
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "one augmentation",
        """
        strategy: full
        augment: mixup
        """,
        """
        recipe.yaml:2: augment
          given mixup; allowed: auto, none, light, standard, strong or a list of random_resized_crop, random_crop, horizontal_flip, vertical_flip, rotation, color_jitter, rand_augment, trivial_augment, random_erasing, mixup, cutmix, word_dropout or word_swap
          write a list: [mixup]
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "augmentation without a name",
        """
        strategy: full
        augment: [{alpha: 0.2}]
        """,
        """
        recipe.yaml:2: augment.0.name
          missing; allowed: random_resized_crop, random_crop, horizontal_flip, vertical_flip, rotation, color_jitter, rand_augment, trivial_augment, random_erasing, mixup, cutmix, word_dropout or word_swap
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "augmentation values",
        """
        strategy: full
        augment:
          - {name: mixup, alpha: 0}
          - {name: random_resized_crop, scale: [0.5]}
          - {name: rotation, degrees: 270}
        """,
        """
        recipe.yaml:3: augment.0.alpha
          given 0; allowed: a number above 0
        recipe.yaml:4: augment.1.scale
          given [0.5]; allowed: a list of 2 numbers
        recipe.yaml:5: augment.2.degrees
          given 270; allowed: a number above 0 and of at most 180
        3 problems in recipe.yaml
        """,
    ),
    Broken(
        "selectors",
        """
        strategy:
          phases:
            - {train: classifier}
            - {train: [head, last:0]}
            - {train: {match: 'layer('}}
            - {train: {mach: layer}}
            - {lr: 0.1x}
        """,
        """
        recipe.yaml:3: strategy.phases.0.train
          given classifier; allowed: head, all, last:N, first:N, stem, block.N, biases, norms, adapters, {match: <regex>} or a list of them
          'classifier' is no selector
        recipe.yaml:4: strategy.phases.1.train
          given [head, 'last:0']; allowed: head, all, last:N, first:N, stem, block.N, biases, norms, adapters, {match: <regex>} or a list of them
          'last:0' is no selector
        recipe.yaml:5: strategy.phases.2.train.match
          given layer(; allowed: text
          not a regular expression: missing ), unterminated subpattern at position 5
        recipe.yaml:6: strategy.phases.3.train.mach
          unknown key, given layer
          did you mean 'match'?
          allowed: match
        recipe.yaml:7: strategy.phases.4.train
          missing; allowed: head, all, last:N, first:N, stem, block.N, biases, norms, adapters, {match: <regex>} or a list of them
        5 problems in recipe.yaml
        """,
    ),
    Broken(
        "phase values",
        """
        strategy:
          phases:
            - {train: head, until: plateu}
            - {train: last:2, until: {plateau: {patience: 0}}}
            - {train: all, layer_decay: 2, batch_norm: freeze}
        """,
        """
        recipe.yaml:3: strategy.phases.0.until
          given plateu; allowed: plateau, null or a section with plateau
          did you mean 'plateau'?
        recipe.yaml:4: strategy.phases.1.until.plateau.patience
          given 0; allowed: a whole number of at least 1
        recipe.yaml:5: strategy.phases.2.layer_decay
          given 2; allowed: null or a number above 0 and of at most 1
        recipe.yaml:5: strategy.phases.2.batch_norm
          given freeze; allowed: auto, frozen, adapt or train
          did you mean 'frozen'?
        4 problems in recipe.yaml
        """,
    ),
    Broken(
        "no phases",
        """
        strategy: {phases: []}
        """,
        """
        recipe.yaml:1: strategy.phases
          given []; allowed: a list of sections with train, for, until, lr, backbone_lr, layer_decay, rates, batch_norm, solver, not empty
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "surgical block",
        """
        strategy: {name: surgical, block: upper}
        """,
        """
        recipe.yaml:1: strategy.block
          given upper; allowed: first, middle, last, stem or block.N
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "two ways to rate layers",
        """
        strategy:
          name: discriminative
          backbone_lr: 0.1x
          layer_decay: 0.75
        """,
        """
        recipe.yaml:4: strategy.layer_decay
          given 0.75, with strategy.backbone_lr: 0.1x (recipe.yaml:3)
          `backbone_lr` and `layer_decay` both rate the backbone's layers
          keep one, remove the other
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "two ways to rate layers, unfrozen one by one",
        """
        strategy: {name: gradual, backbone_lr: 0.1x, decay: 2.6}
        """,
        """
        recipe.yaml:1: strategy.decay
          given 2.6, with strategy.backbone_lr: 0.1x (recipe.yaml:1)
          `backbone_lr` and `decay` both rate the backbone's layers
          keep one, remove the other
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "two ways to rate layers in a phase",
        """
        strategy:
          phases:
            - {train: head, for: 2 epochs}
            - {train: all, backbone_lr: 0.1x, layer_decay: 0.75}
        """,
        """
        recipe.yaml:4: strategy.phases.1.layer_decay
          given 0.75, with strategy.phases.1.backbone_lr: 0.1x (recipe.yaml:4)
          `backbone_lr` and `layer_decay` both rate the backbone's layers
          keep one, remove the other
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "image augmentation on texts",
        """
        task: text-classification
        backbone: user/bert
        data: reviews.csv
        strategy: full
        augment: [horizontal_flip, word_dropout]
        """,
        """
        recipe.yaml:5: augment.0.name
          given horizontal_flip, with task: text-classification (recipe.yaml:1)
          an image augmentation does nothing for texts
          remove it, or choose from word_dropout, word_swap
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "text augmentation on images",
        """
        strategy: full
        augment:
          - word_dropout
        """,
        """
        recipe.yaml:3: augment.0.name
          given word_dropout, with data.path: shipped/digits (default)
          a text augmentation does nothing for images
          remove it, or choose from random_resized_crop, random_crop, horizontal_flip, vertical_flip, rotation, color_jitter, rand_augment, trivial_augment, random_erasing, mixup, cutmix
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "mixed augmentations",
        """
        backbone: user/net
        data: user/set
        strategy: full
        augment: [rotation, word_swap]
        """,
        """
        recipe.yaml:4: augment.1.name
          given word_swap, with augment.0.name: rotation (recipe.yaml:4)
          a text augmentation does nothing for images
          remove it, or choose from random_resized_crop, random_crop, horizontal_flip, vertical_flip, rotation, color_jitter, rand_augment, trivial_augment, random_erasing, mixup, cutmix
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "backbone for texts, data of images",
        """
        strategy: full
        backbone: shipped/minilm
        """,
        """
        recipe.yaml:2: backbone.id
          given shipped/minilm, with data.path: shipped/digits (default)
          data.path is about images, backbone.id is about texts
          for images there are data: shipped/digits and backbone: shipped/tiny-resnet, or your own
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "task of the other kind",
        """
        task: text-classification
        backbone: user/bert
        data: shipped/digits
        strategy: full
        """,
        """
        recipe.yaml:3: data.path
          given shipped/digits, with task: text-classification (recipe.yaml:1)
          task is about texts, data.path is about images
          for texts there are data: shipped/reviews and backbone: shipped/minilm, or your own
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "shipped names",
        """
        backbone: shipped/tiny_resnet
        data: shipped/flowers
        strategy: full
        """,
        """
        recipe.yaml:1: backbone.id
          given shipped/tiny_resnet; the package ships shipped/tiny-resnet and shipped/minilm
          did you mean 'shipped/tiny-resnet'?
        recipe.yaml:2: data.path
          given shipped/flowers; the package ships shipped/digits and shipped/reviews
          choose one of them, a Hub id or a local path
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "epochs and steps",
        """
        strategy: full
        training: {epochs: 3, steps: 100}
        """,
        """
        recipe.yaml:2: training.steps
          given 100, with training.epochs: 3 (recipe.yaml:2)
          both say how long the run is
          keep one, remove the other
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "no length",
        """
        strategy: full
        training: {epochs: null}
        """,
        """
        recipe.yaml:2: training.epochs
          given null, with training.steps: null (default)
          the run has no length
          set training.epochs or training.steps
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "micro batch does not divide",
        """
        strategy: full
        training:
          batch_size: 100
          micro_batch_size: 48
        """,
        """
        recipe.yaml:4: training.micro_batch_size
          given 48, with training.batch_size: 100 (recipe.yaml:3)
          it does not divide the batch of an optimizer step, which takes a whole number of forward passes
          set training.micro_batch_size: 25, or training.batch_size: 96
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "micro batch larger",
        """
        strategy: full
        training: {micro_batch_size: 64}
        """,
        """
        recipe.yaml:2: training.micro_batch_size
          given 64, with training.batch_size: 32 (default)
          it is larger than the batch of an optimizer step, which takes a whole number of forward passes
          set training.micro_batch_size: 32, or training.batch_size: 64
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "micro batch that holds no text",
        """
        task: text-classification
        backbone: bert-base-uncased
        data: {path: mails.csv, max_length: 256}
        strategy: full
        training: {micro_batch_tokens: 200}
        """,
        """
        recipe.yaml:5: training.micro_batch_tokens
          given 200, with data.max_length: 256 (recipe.yaml:3)
          200 tokens do not hold one text of 256
          set training.micro_batch_tokens: 256 or more, or data.max_length: 200 or less
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "tokens of images",
        """
        data: shipped/digits
        strategy: full
        training: {micro_batch_tokens: 4096}
        """,
        """
        recipe.yaml:3: training.micro_batch_tokens
          given 4096, with data.path: shipped/digits (recipe.yaml:1)
          images have no tokens
          set training.micro_batch_size instead
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "decoded texts",
        """
        task: text-classification
        backbone: shipped/minilm
        data: {path: shipped/reviews, cache: decoded}
        strategy: full
        """,
        """
        recipe.yaml:3: data.cache
          given decoded, with task: text-classification (recipe.yaml:1)
          images are decoded; texts are tokenised once in any case
          remove the key
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "texts on the accelerator",
        """
        task: text-classification
        backbone: shipped/minilm
        data: {path: shipped/reviews, augment_on: accelerator}
        strategy: full
        """,
        """
        recipe.yaml:3: data.augment_on
          given accelerator, with task: text-classification (recipe.yaml:1)
          the accelerator augments images; words are changed before they are tokenised
          remove the key
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "images augmented elsewhere",
        """
        strategy: full
        data: {augment_on: gpu}
        """,
        """
        recipe.yaml:2: data.augment_on
          given gpu; allowed: auto, workers or accelerator
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "images kept in another form",
        """
        strategy: full
        data: {cache: jpeg, cache_budget: 8}
        """,
        """
        recipe.yaml:2: data.cache
          given jpeg; allowed: decoded or null
        recipe.yaml:2: data.cache_budget
          given 8; allowed: a size (8GB)
          a size is a number above 0 and its unit (B, KB, MB, GB, TB), such as 8GB
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "odd batches mixed",
        """
        strategy: full
        augment: [mixup]
        training: {batch_size: 45, micro_batch_size: 15}
        """,
        """
        recipe.yaml:3: training.micro_batch_size
          given 15, with augment.0.name: mixup (recipe.yaml:2)
          samples are blended in pairs, so a forward pass takes an even number of them
          choose an even number
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "values mixed",
        """
        strategy: full
        augment: [cutmix]
        data: {path: prices.csv, labels: regression, class_weights: balanced}
        backbone: user/net
        training: {label_smoothing: 0.1}
        """,
        """
        recipe.yaml:2: augment.0.name
          given cutmix, with data.labels: regression (recipe.yaml:3)
          it blends the targets of classes; values are not classes
          remove it
        recipe.yaml:3: data.class_weights
          given balanced, with data.labels: regression (recipe.yaml:3)
          regression has no classes to weigh
          set data.class_weights: none
        recipe.yaml:5: training.label_smoothing
          given 0.1, with data.labels: regression (recipe.yaml:3)
          smoothing spreads the target of one class over the others, so it needs single labels
          set training.label_smoothing: 0
        3 problems in recipe.yaml
        """,
    ),
    Broken(
        "unknown metric",
        """
        strategy: full
        monitor: {metric: acuracy, metrics: [f1, auc]}
        """,
        """
        recipe.yaml:2: monitor.metric
          given acuracy; no metric has this name; did you mean 'accuracy'?
          for single labels there are loss, accuracy, balanced_accuracy, top5_accuracy, f1_macro, f1_micro, precision_macro, recall_macro, mcc, roc_auc, log_loss; a metric of Hugging Face evaluate is written evaluate/<name>
        recipe.yaml:2: monitor.metrics.0
          given f1; no metric has this name; did you mean 'f1_macro'?
          for single labels there are loss, accuracy, balanced_accuracy, top5_accuracy, f1_macro, f1_micro, precision_macro, recall_macro, mcc, roc_auc, log_loss; a metric of Hugging Face evaluate is written evaluate/<name>
        recipe.yaml:2: monitor.metrics.1
          given auc; no metric has this name; did you mean 'roc_auc'?
          for single labels there are loss, accuracy, balanced_accuracy, top5_accuracy, f1_macro, f1_micro, precision_macro, recall_macro, mcc, roc_auc, log_loss; a metric of Hugging Face evaluate is written evaluate/<name>
        3 problems in recipe.yaml
        """,
    ),
    Broken(
        "metric of other labels",
        """
        strategy: full
        data: {path: user/tags, labels: multi}
        monitor: {metric: accuracy, metrics: [mse]}
        """,
        """
        recipe.yaml:3: monitor.metric
          given accuracy, with data.labels: multi (recipe.yaml:2)
          accuracy is for single labels
          for multi labels there are loss, f1_macro, f1_micro, precision_macro, recall_macro, roc_auc, average_precision, subset_accuracy, log_loss
        recipe.yaml:3: monitor.metrics.0
          given mse, with data.labels: multi (recipe.yaml:2)
          mse is for regression labels
          for multi labels there are loss, f1_macro, f1_micro, precision_macro, recall_macro, roc_auc, average_precision, subset_accuracy, log_loss
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "metric without a direction",
        """
        strategy: full
        monitor: {metric: evaluate/meteor}
        """,
        """
        recipe.yaml:2: monitor.metric
          given evaluate/meteor, with monitor.mode: auto (default)
          the metrics of Hugging Face evaluate do not say which way is better
          set monitor.mode: max, or min
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "worst weights",
        """
        strategy: full
        monitor: {metric: loss, mode: max}
        """,
        """
        recipe.yaml:2: monitor.mode
          given max, with monitor.metric: loss (recipe.yaml:2)
          the run would keep its worst weights: loss is better at its lowest
          set monitor.mode: auto
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "no evaluation",
        """
        strategy: full
        training: {epochs: 3}
        monitor: {evaluate: 5 epochs}
        """,
        """
        recipe.yaml:3: monitor.evaluate
          given 5 epochs, with training.epochs: 3 (recipe.yaml:2)
          the run ends before its first evaluation
          evaluate at most every 3 epochs, or train longer
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "early stopping too patient",
        """
        strategy: full
        training: {epochs: 4}
        monitor:
          early_stopping: {patience: 5}
        """,
        """
        recipe.yaml:4: monitor.early_stopping.patience
          given 5, with training.epochs: 4 (recipe.yaml:2), monitor.evaluate: 1 epoch (default)
          early stopping takes 6 evaluations, the run has 4
          set a patience of at most 3, or evaluate more often (monitor.evaluate: 20%) or train longer
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "plateaus without evaluations",
        """
        strategy: {name: gradual, every: plateau}
        monitor: {evaluate: 100%}
        """,
        """
        recipe.yaml:1: strategy.every
          given plateau, with monitor.evaluate: 100% (recipe.yaml:2), strategy.patience: 1 (default), training.epochs: 10 (default)
          a plateau takes 2 evaluations, the run has 1
          evaluate more often (monitor.evaluate: 20%) or train longer
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "plateau of a phase",
        """
        strategy:
          phases:
            - {train: head, until: {plateau: {patience: 4}}}
            - {train: all}
        training: {steps: 300}
        monitor: {evaluate: 100 steps}
        """,
        """
        recipe.yaml:3: strategy.phases.0.until
          given {plateau: {patience: 4}}, with monitor.evaluate: 100 steps (recipe.yaml:6), training.steps: 300 (recipe.yaml:5)
          a plateau takes 5 evaluations, the run has 3
          set a patience of at most 2, or evaluate more often (monitor.evaluate: 20%) or train longer
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "plateau of a schedule",
        """
        strategy: full
        schedule: {name: reduce_on_plateau, patience: 3}
        training: {epochs: 3}
        """,
        """
        recipe.yaml:2: schedule.patience
          given 3, with schedule.name: reduce_on_plateau (recipe.yaml:2), training.epochs: 3 (recipe.yaml:3), monitor.evaluate: 1 epoch (default)
          a plateau takes 4 evaluations, the run has 3
          set a patience of at most 2, or evaluate more often (monitor.evaluate: 20%) or train longer
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "warmup of a rising curve",
        """
        strategy: full
        schedule: {name: one_cycle, warmup: 10%}
        """,
        """
        recipe.yaml:2: schedule.warmup
          given 10%, with schedule.name: one_cycle (recipe.yaml:2)
          this curve rises by itself, so a warmup would come on top
          remove schedule.warmup; schedule.rise sets how long the curve rises
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "endless warmup",
        """
        strategy: full
        schedule: {warmup: 12 epochs}
        """,
        """
        recipe.yaml:2: schedule.warmup
          given 12 epochs, with training.epochs: 10 (default)
          the rate would rise until the run ends
          warm up for less than 10 epochs, such as 10%
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "phases too long",
        """
        strategy:
          phases:
            - {train: head, for: 4 epochs}
            - {train: all, for: 80%}
        """,
        """
        recipe.yaml:4: strategy.phases.1.for
          given 80%, with strategy.phases.0.for: 4 epochs (recipe.yaml:3), training.epochs: 10 (default)
          the phases take 120% of the run
          shorten them, or train longer; the last phase needs no `for`: it takes what is left
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "phases too short",
        """
        strategy:
          phases:
            - {train: head, for: 2 epochs}
            - {train: all, for: 3 epochs}
        """,
        """
        recipe.yaml:4: strategy.phases.1.for
          given 3 epochs, with strategy.phases.0.for: 2 epochs (recipe.yaml:3), training.epochs: 10 (default)
          the phases take only 50% of the run
          remove `for` from the last phase: it takes what is left
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "probe too long",
        """
        strategy: {name: lp_ft, probe: 10 epochs}
        """,
        """
        recipe.yaml:1: strategy.probe
          given 10 epochs, with training.epochs: 10 (default)
          the run would end before all layers train
          probe for less than 10 epochs, such as 40%
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver of another name",
        """
        strategy: {name: frozen, solver: newton}
        """,
        """
        recipe.yaml:1: strategy.solver
          given newton; allowed: lbfgs, ridge or null
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver without features",
        """
        strategy: {name: frozen, solver: lbfgs}
        cache: off
        """,
        """
        recipe.yaml:1: strategy.solver
          given lbfgs, with cache: off (recipe.yaml:2)
          lbfgs fits features that are computed once, and `off` keeps none
          set cache: auto, or remove the solver
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver and checkpointing",
        """
        strategy: {name: lp_ft, solver: ridge}
        training: {gradient_checkpointing: true}
        """,
        """
        recipe.yaml:1: strategy.solver
          given ridge, with training.gradient_checkpointing: true (recipe.yaml:2)
          ridge fits features that are computed once, and checkpointing runs layers again
          remove training.gradient_checkpointing, or the solver
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver and mixing",
        """
        strategy: {phases: [{train: head, solver: lbfgs}, {train: all}]}
        augment: [mixup]
        """,
        """
        recipe.yaml:1: strategy.phases.0.solver
          given lbfgs, with augment.0.name: mixup (recipe.yaml:2)
          lbfgs fits rows one by one, and mixing blends the targets of two
          remove the solver, or what mixes
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver and augmentation",
        """
        strategy: {name: frozen, solver: lbfgs}
        augment: [horizontal_flip]
        """,
        """
        recipe.yaml:2: augment
          given [{name: horizontal_flip}], with strategy.solver: lbfgs (recipe.yaml:1)
          lbfgs fits the rows as they are measured, so nothing would be augmented
          remove augment, or keep random views of each row: cache: {views: 4}
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solved probe with a length",
        """
        strategy: {name: lp_ft, solver: lbfgs, probe: 2 epochs}
        """,
        """
        recipe.yaml:1: strategy.probe
          given 2 epochs, with strategy.solver: lbfgs (recipe.yaml:1)
          lbfgs fits the head to convergence in one step
          remove strategy.probe, or set strategy.solver: null for gradient steps
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver of more than the head",
        """
        strategy: {phases: [{train: last:2, solver: lbfgs}]}
        """,
        """
        recipe.yaml:1: strategy.phases.0.solver
          given lbfgs
          `solver` fits the head alone
          write `train: head`, or leave the solver out
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver with rates",
        """
        strategy: {phases: [{train: head, solver: ridge, for: 2 epochs, lr: 0.1x}, {train: all}]}
        """,
        """
        recipe.yaml:1: strategy.phases.0.lr
          given 0.1x, with strategy.phases.0.solver: ridge (recipe.yaml:1), with strategy.phases.0.for: 2 epochs (recipe.yaml:1)
          `solver` takes one step and no rates
          remove `for` and `lr`
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver and moving statistics",
        """
        strategy: {name: frozen, solver: ridge, batch_norm: adapt}
        """,
        """
        recipe.yaml:1: strategy.batch_norm
          given adapt, with strategy.solver: ridge (recipe.yaml:1)
          `solver` fits what is computed once, which `batch_norm` that adapts changes
          remove one of the two
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "solver after an average",
        """
        strategy: {phases: [{train: all}, {train: head, solver: ridge}]}
        training: {ema: {}}
        """,
        """
        recipe.yaml:2: training.ema
          given {}, with strategy.phases.1.solver: ridge (recipe.yaml:1)
          the head would be fitted to the weights as they are and measured on their average
          remove training.ema, or put the solver's phase first
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "phases too short before a solver",
        """
        strategy:
          phases:
            - {train: all, for: 2 epochs}
            - {train: head, solver: ridge}
        """,
        """
        recipe.yaml:3: strategy.phases.0.for
          given 2 epochs, with training.epochs: 10 (default)
          the phases take only 20% of the run
          remove `for` from the last phase: it takes what is left
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "frozen random weights",
        """
        strategy: frozen
        backbone: {id: timm/resnet18, pretrained: false}
        """,
        """
        recipe.yaml:2: backbone.pretrained
          given false, with strategy.name: frozen (recipe.yaml:1)
          layers that do not learn would keep their random weights
          set backbone.pretrained: true, or strategy: scratch
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "frozen random weights in phases",
        """
        strategy: {phases: [{train: head, for: 1 epoch}, {train: all}]}
        backbone: {id: timm/resnet18, pretrained: false}
        """,
        """
        recipe.yaml:2: backbone.pretrained
          given false, with strategy.phases.0.train: head (recipe.yaml:1)
          layers that do not learn would keep their random weights
          set backbone.pretrained: true, or strategy: scratch
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "quantised weights that would learn",
        """
        strategy: gradual
        backbone: {id: shipped/tiny-resnet, quantize: 4bit}
        """,
        """
        recipe.yaml:2: backbone.quantize
          given 4bit, with strategy.name: gradual (recipe.yaml:1)
          quantised weights cannot learn, and gradual trains them
          choose from frozen, bitfit, norms, lora, dora, rslora, lora_plus, adalora, ia3, vera, oft, boft, ln_tuning, or remove backbone.quantize
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "quantised weights that a phase would train",
        """
        strategy: {adapter: lora, phases: [{train: [adapters, head], for: 50%}, {train: "last:2"}]}
        backbone: {id: user/net, quantize: 8bit}
        """,
        """
        recipe.yaml:2: backbone.quantize
          given 8bit, with strategy.phases.1.train: last:2 (recipe.yaml:1)
          quantised weights cannot learn, and last:2 trains them
          choose from head, last:1, adapters, biases, norms, or remove backbone.quantize
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "a method that cannot go on quantised layers",
        """
        strategy: pissa
        backbone: {id: user/net, quantize: 4bit}
        """,
        """
        recipe.yaml:2: backbone.quantize
          given 4bit, with strategy.name: pissa (recipe.yaml:1)
          peft computes no pissa on layers in 4bit
          methods that can: lora, dora, rslora, lora_plus, adalora, ia3, vera, oft, boft, ln_tuning
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "8 bits merged",
        """
        strategy: {name: lora, merge: true}
        backbone: {id: user/net, quantize: 8bit}
        """,
        """
        recipe.yaml:2: backbone.quantize
          given 8bit, with strategy.name: lora (recipe.yaml:1)
          layers in 8bit round what they are given, so a plain model would not answer as the one measured
          set backbone.quantize: 4bit, or train adapters with merge: false
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "code from the Hub",
        """
        strategy: full
        backbone: {id: user/net, trust_remote_code: true}
        """,
        """
        recipe.yaml:2: backbone.trust_remote_code
          given true, with backbone.id: user/net (recipe.yaml:2)
          code from the Hub may change between two runs
          read it, then set backbone.revision to that commit
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "code from a branch of the Hub, and a pickle by a pattern",
        """
        strategy: full
        backbone: {id: user/net, revision: main, trust_remote_code: true, allow_pickle: '*.bin'}
        """,
        """
        recipe.yaml:2: backbone.revision
          given main, with backbone.trust_remote_code: true (recipe.yaml:2)
          a branch or tag may mean other code tomorrow
          read the code, then set backbone.revision to that commit, all 40 digits of it
        recipe.yaml:2: backbone.allow_pickle
          given '*.bin'; it is the exact name of one file, which ends in .bin, .pth, .pt or .ckpt
          name the file, such as pytorch_model.bin
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "revisions of local things",
        """
        strategy: full
        backbone: {id: ./net, revision: main}
        data: {path: shipped/digits, config: big}
        """,
        """
        recipe.yaml:2: backbone.revision
          given main, with backbone.id: ./net (recipe.yaml:2)
          only a Hub id has a revision
          remove backbone.revision
        recipe.yaml:3: data.config
          given big, with data.path: shipped/digits (recipe.yaml:3)
          only a Hub id has a configuration
          remove data.config
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "unknown splits",
        """
        strategy: full
        data: {path: shipped/digits, train: 'trian[:90%]', validation: val}
        """,
        """
        recipe.yaml:2: data.train
          given trian[:90%], with data.path: shipped/digits (recipe.yaml:2)
          its splits are train, validation and test
          did you mean 'train'?
        recipe.yaml:2: data.validation
          given val, with data.path: shipped/digits (recipe.yaml:2)
          its splits are train, validation and test
          choose one of them
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "fraction beside a split",
        """
        strategy: full
        data: {path: shipped/digits, validation: 0.2}
        """,
        """
        recipe.yaml:2: data.validation
          given 0.2, with data.path: shipped/digits (recipe.yaml:2)
          the data has its own validation split, 'validation', which would go unused
          set data.validation: auto, or keep the fraction and set data.test: validation
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "fraction beside a folder",
        """
        strategy: full
        backbone: user/net
        data: {path: birds, validation: 0.2}
        """,
        """
        recipe.yaml:3: data.validation
          given 0.2, with data.path: birds (recipe.yaml:3)
          the data has its own validation split, 'val', which would go unused
          set data.validation: auto, or keep the fraction and set data.test: val
        1 problem in recipe.yaml
        """,
        files={"birds/train/a/1.png": "", "birds/val/a/1.png": ""},
    ),
    Broken(
        "unknown tracker",
        """
        strategy: full
        trackers: [tensorbord, all]
        """,
        """
        recipe.yaml:2: trackers.0
          given tensorbord; no tracker has this name; did you mean 'tensorboard'?
          choose from tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive, swanlab
        recipe.yaml:2: trackers.1
          given all; no tracker has this name
          choose from tensorboard, wandb, trackio, mlflow, comet_ml, aim, clearml, dvclive, swanlab
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "extends nothing",
        """
        extends: bse.yaml
        strategy: full
        """,
        """
        recipe.yaml:1: extends
          given bse.yaml; there is no such file
          did you mean 'base.yaml'?
          shipped recipes: adalora, bitfit, discriminative, dora, frozen, full, gradual, gradual_plateau, ia3, layer_decay, lora, lora_plus, lora_then_layers, lp_ft, norms, probe, scratch, surgical, base
        1 problem in recipe.yaml
        """,
        files={"base.yaml": "strategy: frozen\n"},
    ),
    Broken(
        "extends itself",
        """
        extends: recipe.yaml
        """,
        """
        recipe.yaml:1: extends
          goes in a circle: recipe.yaml -> recipe.yaml
          extend another recipe
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "extends in a circle",
        """
        strategy: full
        extends: a.yaml
        """,
        """
        b.yaml:2: extends
          goes in a circle: a.yaml -> b.yaml -> a.yaml
          extend another recipe
        1 problem in recipe.yaml
        """,
        files={"a.yaml": "extends: b.yaml\n", "b.yaml": "task: auto\nextends: a.yaml\n"},
    ),
    Broken(
        "extends a list",
        """
        extends: [base.yaml]
        strategy: full
        """,
        """
        recipe.yaml:1: extends
          given [base.yaml]; allowed: a file beside this one, or a shipped recipe's name
        1 problem in recipe.yaml
        """,
    ),
    Broken(
        "problems in both files",
        """
        extends: mine.yaml
        strategy: full
        training: {epochs: 0}
        """,
        """
        recipe.yaml:3: training.epochs
          given 0; allowed: null or a number above 0
        mine.yaml:2: training.batch_size
          given 0; allowed: a whole number of at least 1
        mine.yaml:5: monitor.metric
          given acuracy; no metric has this name; did you mean 'accuracy'?
          for single labels there are loss, accuracy, balanced_accuracy, top5_accuracy, f1_macro, f1_micro, precision_macro, recall_macro, mcc, roc_auc, log_loss; a metric of Hugging Face evaluate is written evaluate/<name>
        3 problems in recipe.yaml
        """,
        files={"mine.yaml": "training:\n  batch_size: 0\n  epochs: -1\nmonitor:\n  metric: acuracy\n"},
    ),
    Broken(
        "broken base",
        """
        extends: mine.yaml
        strategy: full
        """,
        """
        mine.yaml:1
          given training: {epochs: 3; not YAML: a bracket that is not closed, or a missing comma
          close it with ] or }, and put text that holds brackets or commas in quotes
        1 problem in recipe.yaml
        """,
        files={"mine.yaml": "training: {epochs: 3\n"},
    ),
    Broken(
        "overrides that are none",
        """
        strategy: full
        """,
        """
        command line: training.epochs
          given training.epochs; allowed: KEY=VALUE, KEY= for null, or ~KEY to take a key out
          for example training.epochs=VALUE
        command line: =3
          given =3; allowed: KEY=VALUE, KEY= for null, or ~KEY to take a key out
          for example training.epochs=VALUE
        command line: training.epochs
          given ~training.epochs=3; allowed: KEY=VALUE, KEY= for null, or ~KEY to take a key out
          for example ~training.epochs
        command line: training..epochs
          given training..epochs=3; allowed: KEY=VALUE, KEY= for null, or ~KEY to take a key out
          for example training..epochs=VALUE
        4 problems in recipe.yaml
        """,
        overrides=("training.epochs", "=3", "~training.epochs=3", "training..epochs=3"),
    ),
    Broken(
        "overrides of unknown keys",
        """
        strategy: full
        """,
        """
        command line: training.epoch
          there is no such key to take out
          did you mean 'epochs'?
        command line: data.path
          given {train: x}; allowed: text or a list of texts, not empty
        command line: epochs
          unknown key, given 3
          it belongs under training:
        command line: trainning
          unknown key, given {epochs: 3}
          did you mean 'training'?
          allowed: extends, task, backbone, data, augment, strategy, optimizer, schedule, training, cache, monitor, trackers, output, hub
        4 problems in recipe.yaml
        """,
        overrides=("epochs=3", "trainning.epochs=3", "~training.epoch", "data.path.train=x"),
    ),
    Broken(
        "overrides that are no YAML",
        """
        strategy: full
        """,
        """
        command line: augment
          given [mixup; not YAML: a bracket that is not closed, or a missing comma
          close it with ] or }, and put text that holds brackets or commas in quotes
        command line: output
          given a: b: c; not YAML: a second ': ' on one line
          put text that contains ': ' in quotes
        2 problems in recipe.yaml
        """,
        overrides=("augment=[mixup", "output=a: b: c"),
    ),
    Broken(
        "override of an item",
        """
        strategy: full
        augment: [mixup]
        """,
        """
        command line: augment.1.alpha
          augment has 1 item, counted from 0
          to replace the list set augment itself
        command line: augment.0.alpha
          given -1; allowed: a number above 0
        2 problems in recipe.yaml
        """,
        overrides=("augment.1.alpha=0.2", "augment.0.alpha=-1"),
    ),
    Broken(
        "extends on the command line",
        """
        strategy: full
        """,
        """
        command line: extends
          a file says what it extends, the command line does not
          load the other recipe instead
        1 problem in recipe.yaml
        """,
        overrides=("extends=base",),
    ),
    Broken(
        "null on the command line",
        """
        strategy: full
        """,
        """
        command line: training.batch_size
          given null; allowed: a whole number of at least 1
          leave the key out for its default
        1 problem in recipe.yaml
        """,
        overrides=("training.batch_size=",),
    ),
    Broken(
        "conflict across places",
        """
        strategy: {name: discriminative, backbone_lr: 0.1x}
        """,
        """
        command line: strategy.layer_decay
          given 0.75, with strategy.backbone_lr: 0.1x (recipe.yaml:1)
          `backbone_lr` and `layer_decay` both rate the backbone's layers
          keep one, remove the other
        command line: training.micro_batch_size
          given 7, with training.batch_size: 32 (default)
          it does not divide the batch of an optimizer step, which takes a whole number of forward passes
          set training.micro_batch_size: 4, or training.batch_size: 35
        2 problems in recipe.yaml
        """,
        overrides=("strategy.layer_decay=0.75", "training.micro_batch_size=7"),
    ),
    Broken(
        "everything at once",
        """
        extends: mine.yaml
        strategy: {name: lp_ft, prob: 2 epochs}
        training:
          batch_size: 30
          micro_batch_size: 20
          lr: 1e-3
        monitor: {metric: acuracy}
        """,
        """
        recipe.yaml:2: strategy.prob
          unknown key, given 2 epochs
          did you mean 'probe'?
          allowed: name, solver, probe, full_lr, batch_norm
        recipe.yaml:5: training.micro_batch_size
          given 20, with training.batch_size: 30 (recipe.yaml:4)
          it does not divide the batch of an optimizer step, which takes a whole number of forward passes
          set training.micro_batch_size: 15, or training.batch_size: 40
        recipe.yaml:6: training.lr
          unknown key, given 1e-3
          it belongs under optimizer:
        recipe.yaml:7: monitor.metric
          given acuracy; no metric has this name; did you mean 'accuracy'?
          for single labels there are loss, accuracy, balanced_accuracy, top5_accuracy, f1_macro, f1_micro, precision_macro, recall_macro, mcc, roc_auc, log_loss; a metric of Hugging Face evaluate is written evaluate/<name>
        mine.yaml:1: schedule.warmup
          given 10%, with schedule.name: one_cycle (mine.yaml:1)
          this curve rises by itself, so a warmup would come on top
          remove schedule.warmup; schedule.rise sets how long the curve rises
        command line: training.epochs
          given ten; allowed: null or a number above 0
        command line: backbone.id
          given shipped/minilm, with data.path: shipped/digits (default)
          data.path is about images, backbone.id is about texts
          for images there are data: shipped/digits and backbone: shipped/tiny-resnet, or your own
        7 problems in recipe.yaml
        """,
        overrides=("backbone=shipped/minilm", "training.epochs=ten"),
        files={"mine.yaml": "schedule: {name: one_cycle, warmup: 10%}\n"},
    ),
    Broken(
        "what a stream cannot do",
        """
        strategy: frozen
        data:
          path: rows.csv
          streaming: true
          max_samples: 100
          class_weights: balanced
          validation: train[:10%]
          classes: [a, b, a]
        """,
        """
        recipe.yaml:5: data.max_samples
          given 100, with data.streaming: true (recipe.yaml:4)
          samples are drawn from all rows, which a stream does not hold
          remove data.max_samples; training.steps sets how much is read
        recipe.yaml:6: data.class_weights
          given balanced, with data.streaming: true (recipe.yaml:4)
          weights go by the rows of each class, which nobody has counted in a stream
          remove data.class_weights, or data.streaming
        recipe.yaml:7: data.validation
          given train[:10%], with data.streaming: true (recipe.yaml:4)
          a stream has no slices
          name a whole split or file; a fraction such as 0.1 sets rows aside
        recipe.yaml:8: data.classes
          given [a, b, a]; it names a label twice
          name each label once
        4 problems in recipe.yaml
        """,
    ),
    Broken(
        "what only a stream needs",
        """
        strategy: frozen
        data: {path: rows.csv, rows: 100, shuffle_buffer: 10}
        """,
        """
        recipe.yaml:2: data.rows
          given 100, with data.streaming: false (default)
          it is about streams; other data are counted, searched and shuffled as a whole
          remove data.rows, or set data.streaming: true
        recipe.yaml:2: data.shuffle_buffer
          given 10, with data.streaming: false (default)
          it is about streams; other data are counted, searched and shuffled as a whole
          remove data.shuffle_buffer, or set data.streaming: true
        2 problems in recipe.yaml
        """,
    ),
    Broken(
        "classes of values",
        """
        strategy: frozen
        data: {path: rows.csv, streaming: true, labels: regression, classes: [a, b]}
        """,
        """
        recipe.yaml:2: data.classes
          given [a, b], with data.labels: regression (recipe.yaml:2)
          regression has no classes
          remove data.classes
        1 problem in recipe.yaml
        """,
    ),
]

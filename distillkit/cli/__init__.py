"""The `distillkit` command: short names in, canonical config out, one run folder per run.

    main.py           the command: which subcommand, exit codes, errors without tracebacks
    yaml_file.py      YAML with the file and line of every key
    recipe.py         config files and command line -> one tree
    arguments.py      what a class takes; unknown, missing and mistyped arguments, all of them at once
    shortnames.py     short names -> `class_path` and `init_args`, for files and command line alike
    canonical.py      the whole tree -> what jsonargparse sees
    lightning.py      `DistillCLI`: LightningCLI on such a tree; the hooks to change a run are there
    launch.py         which run folder: a new one, or the one that `--ckpt_path last` continues; agreed by all ranks
    run_record.py     hashes into the run folder; no logger may delete `metrics.csv`
    environment.py    versions, commit, packages
    listing.py        `distillkit components`; describe_part.py: one part
    shipped.py        `distillkit configs`, and `--config NAME`
    compare.py        `distillkit compare`

Nothing is imported here.
"""

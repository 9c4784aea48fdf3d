"""The study: compares ways to prune on GLUE, from the same dense models and with the same recovery.

    python -m glue_scripts.compare_glue --data_dir PARQUET_FOLDER --preset quick --workers 2
    python -m glue_scripts.compare_glue --data_dir PARQUET_FOLDER --tasks mrpc --methods gradient --ratios 0.8

Run these commands in the checkout's root. A cell is one task, method, budget, ratio, seed and fold. Each cell is a
line of `cells.jsonl`; a cell that is there is not run again. Dense models and their scores are kept beside that file.
After a change of settings or code, start in another folder.

All cells of a task and seed, of all grids, run one after the other. Nothing later needs their dense model, so the
missing cells can run on another machine. Tables (Markdown and CSV) and pictures of each grid follow. Workers share the
cores: two workers with a thread each do nearly twice as much as one worker with two. `--fold` evaluates on a part of
the training split that no model is trained on. Settings are chosen there, not on the validation split.
"""

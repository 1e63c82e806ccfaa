"""Training: a draft and early-exit heads for a target, from text that the target writes itself.

`run.distill` is the whole of it; `python -m mirror.distill` its command. torch lives here and in
`export`; nothing here is needed to run a bundle.
"""

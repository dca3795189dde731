"""What every package uses and none is about: running a model so that nothing of it stays, copies, files, progress.

`running` calls models and puts everything back (`memento` notes it, `hooks` places hooks that go again); `copying`
makes copies that share tensors; `files` and `cache` write whole files or none; `progress` holds the stages of a run.
"""

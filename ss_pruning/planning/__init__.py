"""From scores and a budget to a verified plan: ranking, allocation, plan search, latency targets.

`search` goes round: `ranking` scores the channels, `allocation` takes what the budget asks for by the numbers of
`costs`, a copy is verified, and what fails is excluded. `latency_target` does so until the measured time fits,
`duration` says beforehand how long all will take. Heads of attention have files of their own: `tied_heads`,
`head_dimensions`, `narrow_heads`.
"""

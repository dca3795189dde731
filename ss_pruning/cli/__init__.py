"""The command line, `ss-prune`.

`app` has a function for each command, `request` and `options` its options, `jobs` and `delivery` what it does,
`console` what is seen meanwhile.
"""

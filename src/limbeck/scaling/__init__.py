"""Engines that share work out: on this machine, or with Ray on many. They know no wing, no method and no model.

`sizing` says how many workers of what size, `site` what every worker must find on its machine, `cluster` starts or joins Ray, `trials`
runs pieces of work that leave their result on the disk: here, in processes of this machine, or as tasks of Ray.
"""

"""Forms of the names of others' datasets: what reads their files and what reports on their scores both go by them."""

import re

# random episodes of D4RL with a share of a better level's, which `data/mixtures.py` builds
D4RL_MIXTURE = re.compile(r"(hopper|halfcheetah|walker2d|ant)-random-(medium|expert)-(0\.\d+)-v2")
# a file of OGBench, or one with the rewards of a task
OGBENCH = re.compile(
    r"(?P<environment>(?:visual-)?(?:pointmaze|antmaze|humanoidmaze|antsoccer|cube|scene|puzzle|powderworld)(?:-\w+)?)"
    r"-(?P<kind>navigate|stitch|explore|play|noisy)"
    r"(?P<single>-singletask(?:-task(?P<task>\d+))?)?(?P<oracle>-oraclerep)?-v0(?P<validation>-val)?"
)
FORGE_OGBENCH = "forge/ogbench/"  # before the name of such a set that was built here

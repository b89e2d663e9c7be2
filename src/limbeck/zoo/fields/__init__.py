"""Radiance fields of four architectures behind one interface: what stands where, and what colour it has from there.

Each is cut in two as in Progressive Volume Distillation (arXiv:2211.15977): a first block gives log-density and a feature of the place, a
second one the colour that the feature has from a direction. So any of them can be converted into any other.
"""

from limbeck.zoo.fields.field import Field, FieldOutput
from limbeck.zoo.fields.hash_grid import HashField
from limbeck.zoo.fields.mlp import MLPField
from limbeck.zoo.fields.vm import VMField
from limbeck.zoo.fields.voxels import VoxelField

FIELDS = {"field-mlp": MLPField, "field-hash": HashField, "field-vm": VMField, "field-voxels": VoxelField}
"""Fields by their names in recipes."""

__all__ = ["FIELDS", "Field", "FieldOutput", "HashField", "MLPField", "VMField", "VoxelField"]

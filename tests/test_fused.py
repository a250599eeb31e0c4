"""The fused step's kernel, on CPUs: fused_emulated.cpp runs its threads one by one."""

import ctypes
import dataclasses
import subprocess

import pytest
import torch
from helpers import ROOT, make_batches

from mnist_fast import fused, native
from mnist_fast.augment import augment, derive_key
from mnist_fast.config import Config, load
from mnist_fast.data import Batch, Sharding
from mnist_fast.model import build_network
from mnist_fast.runtime import Runtime
from mnist_fast.step import TrainingStep

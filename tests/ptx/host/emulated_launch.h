// The operators of csrc/cuda over CPU tensors, in a namespace of their own.
#pragma once
#define AVA_OPERATORS_ON_CPU ava_ext_ptx
#include "../../cuda_emulator/emulated_launch.h"

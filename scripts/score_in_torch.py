"""Scores one image in PyTorch: python score_in_torch.py STUDENT TEACHER ARCH IMAGE [MAP.npy].

STUDENT and TEACHER are files of `python -m mmrjax.convert to-torch`, .safetensors or .pth; ARCH is
the teacher's, such as resnet18; IMAGE has 8 bits per channel. Neither JAX nor, with a copy of
mmrjax/weights/torch_twin.py beside this file, mmrjax is needed.
"""

import sys

import numpy as np
import torch

try:
    import torch_twin as mmr
except ImportError:
    from mmrjax.weights import torch_twin as mmr

if len(sys.argv) < 5:
    sys.exit(__doc__)
student_file, teacher_file, arch, image_file, *map_file = sys.argv[1:]
student = mmr.load_student(student_file)
teacher = mmr.load_teacher(teacher_file, arch)
images = mmr.load_image(image_file, **student.view)  # [1, 3, h, w]
with torch.no_grad():
    maps = mmr.anomaly_maps(student(images, 0.0), teacher(images), student.image_size)
print(f"score {mmr.image_scores(maps)[0]:.6f}")
for path in map_file:
    np.save(path, maps[0])

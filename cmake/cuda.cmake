# nvcc and the CUDA runtime come from .venv; a toolkit elsewhere serves with -DCMAKE_CUDA_COMPILER=.
if(NOT PARALLAX_CUDA)
  return()
endif()
file(GLOB venv_cuda ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages/nvidia/cu13)
if(NOT CMAKE_CUDA_COMPILER AND venv_cuda)
  set(CMAKE_CUDA_COMPILER ${venv_cuda}/bin/nvcc CACHE FILEPATH "")
endif()
if(venv_cuda)
  # The wheels keep their libraries in lib; nvcc looks in lib64.
  set(CMAKE_CUDA_FLAGS_INIT "-L${venv_cuda}/lib")
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # every kernel family names its own
set(CMAKE_CUDA_STANDARD 20)
enable_language(CUDA)

# Sets CMAKE_CUDA_COMPILER: the machine's nvcc, else the one in NVIDIA's wheels.
option(AWQ_TRT_NVCC_FROM_WHEELS "Take nvcc from PyPI even where the machine has one" OFF)

# These versions were tested together and compile every architecture.
set(nvcc_wheels nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
                nvidia-cuda-cccl==13.0.85)

if(NOT CMAKE_CUDA_COMPILER AND NOT AWQ_TRT_NVCC_FROM_WHEELS)
  if(DEFINED ENV{CUDACXX})
    find_program(awq_trt_nvcc $ENV{CUDACXX} NO_CACHE)
    if(NOT awq_trt_nvcc)
      message(FATAL_ERROR "CUDACXX is $ENV{CUDACXX}, which is not a program. Correct it, or unset it to let the build "
                          "look for nvcc.")
    endif()
  else()
    find_program(awq_trt_nvcc nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin NO_CACHE)
  endif()
  if(awq_trt_nvcc)
    set(CMAKE_CUDA_COMPILER ${awq_trt_nvcc})
  endif()
endif()

if(NOT CMAKE_CUDA_COMPILER)
  set(cuda_folder ${CMAKE_CURRENT_BINARY_DIR}/cuda)
  fetch_wheels(${cuda_folder} "the CUDA compiler, as this machine has no nvcc" ${nvcc_wheels})
  set(CUDAToolkit_ROOT ${cuda_folder}/nvidia/cu13)
  set(CMAKE_CUDA_COMPILER ${CUDAToolkit_ROOT}/bin/nvcc)
  # the names that nvcc and CMake look for, which the wheels leave out
  file(CREATE_LINK lib ${CUDAToolkit_ROOT}/lib64 SYMBOLIC)
  file(CREATE_LINK libcudart.so.13 ${CUDAToolkit_ROOT}/lib/libcudart.so SYMBOLIC)
  if(NOT EXISTS ${CMAKE_CUDA_COMPILER})
    message(FATAL_ERROR "The wheels ${nvcc_wheels} hold no ${CMAKE_CUDA_COMPILER}. Install CUDA 13 and set CUDACXX.")
  endif()
endif()
message(STATUS "nvcc: ${CMAKE_CUDA_COMPILER}")

if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90-real 100-real 120)  # 120: machine code and PTX
endif()

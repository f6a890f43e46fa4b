# Sets TENSORRT_INCLUDE_DIRS: TENSORRT_ROOT, else the system's headers, else those of TensorRT 10.14 that the
# kernel-lens wheel carries (Apache-2.0). The plugin needs headers only: it links no TensorRT library.
if(DEFINED TENSORRT_ROOT OR DEFINED ENV{TENSORRT_ROOT})
  if(NOT DEFINED TENSORRT_ROOT)
    set(TENSORRT_ROOT $ENV{TENSORRT_ROOT})
  endif()
  find_path(tensorrt_include NvInferRuntime.h NO_CACHE NO_DEFAULT_PATH
            PATHS ${TENSORRT_ROOT} ${TENSORRT_ROOT}/include ${TENSORRT_ROOT}/include/x86_64-linux-gnu)
  if(NOT tensorrt_include)
    message(FATAL_ERROR "TENSORRT_ROOT is ${TENSORRT_ROOT}, which has no include/NvInferRuntime.h. Correct it, or unset "
                        "it to let the build find the headers.")
  endif()
else()
  find_path(tensorrt_include NvInferRuntime.h NO_CACHE
            PATHS /usr/include /usr/include/${CMAKE_LIBRARY_ARCHITECTURE} /usr/local/tensorrt/include)
endif()

if(NOT tensorrt_include)
  set(tensorrt_folder ${CMAKE_CURRENT_BINARY_DIR}/tensorrt)
  fetch_wheels(${tensorrt_folder} "the TensorRT headers" kernel-lens==2.0.1)
  set(tensorrt_include ${tensorrt_folder}/kernel_lens/include/tensorrt)
endif()
file(STRINGS ${tensorrt_include}/NvInferVersion.h major_line REGEX "define (NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) [0-9]+")
string(REGEX MATCH "[0-9]+" tensorrt_major "${major_line}")
if(tensorrt_major AND tensorrt_major LESS 10)
  message(FATAL_ERROR "The TensorRT headers in ${tensorrt_include} are of version ${tensorrt_major}; version 10 or newer "
                      "is needed. Set TENSORRT_ROOT to one, or to nothing to fetch the headers of 10.14.")
endif()
message(STATUS "TensorRT headers: ${tensorrt_include}")
set(TENSORRT_INCLUDE_DIRS ${tensorrt_include})

# Fetch files from PyPI wheels into the build folder, with the Python that runs the build.

# fetch_wheels(<folder> <what for> <requirement>...): unpack wheels into <folder>, once.
function(fetch_wheels folder purpose)
  if(EXISTS ${folder}/.complete)
    return()
  endif()
  if(NOT Python_EXECUTABLE)
    find_package(Python REQUIRED COMPONENTS Interpreter)
  endif()
  list(JOIN ARGN " " requirements)
  message(STATUS "Fetching ${purpose}: ${requirements}")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -m pip install --disable-pip-version-check --quiet --no-deps --only-binary :all:
            --upgrade --target ${folder} ${ARGN}
    RESULT_VARIABLE status
    OUTPUT_VARIABLE output
    ERROR_VARIABLE output)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "Could not fetch ${purpose} with ${Python_EXECUTABLE} -m pip:\n${output}\n"
                        "Install it yourself and say where it is: CUDACXX for nvcc, TENSORRT_ROOT for TensorRT.")
  endif()
  file(TOUCH ${folder}/.complete)
endfunction()

// Masks (csrc/include/freemerge/mask.h) as NumPy arrays of uint8.
#pragma once
#include "buffers.h"

namespace freemerge {

inline const std::uint8_t* mask_of(const py::array& mask) {
  require_contiguous(mask);
  if (!py::isinstance<py::array_t<std::uint8_t>>(mask)) throw py::type_error("freemerge.kernels._cpu: a mask is uint8");
  return static_cast<const std::uint8_t*>(mask.data());
}

inline const std::uint8_t* mask_of(const std::optional<py::array>& mask) { return mask ? mask_of(*mask) : nullptr; }

inline std::uint8_t* mask_target_of(py::array& mask) {
  mask_of(static_cast<const py::array&>(mask));
  return static_cast<std::uint8_t*>(mask.mutable_data());
}

}  // namespace freemerge

// Which instruction sets this build holds and this machine runs.
#pragma once
#include <string>
#include <vector>

namespace hm {

std::vector<std::string> isa_names();     // usable here, best last
std::string isa_name();                   // in use
void set_isa(const std::string& name);    // throws std::invalid_argument naming the usable ones

}  // namespace hm

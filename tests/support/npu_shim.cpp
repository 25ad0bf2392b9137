// An OpenVINO plugin that is the CPU plugin and says it is the NPU. Built by tests/support/npu_emulation.py.
// The wheel ships no developer headers, hence the declarations of our own.
#include <dlfcn.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ov {
class IPlugin {
public:
    void set_device_name(const std::string&);
};
class Extension;
}  // namespace ov

#define EXPORTED extern "C" __attribute__((visibility("default")))

static void* open_cpu_plugin() {
    void* library = dlopen(OV_CPU_LIB, RTLD_NOW | RTLD_LOCAL);
    if (!library) throw std::runtime_error(dlerror());
    return library;
}

EXPORTED void create_plugin_engine(std::shared_ptr<ov::IPlugin>& plugin) {
    using Create = void (*)(std::shared_ptr<ov::IPlugin>&);
    reinterpret_cast<Create>(dlsym(open_cpu_plugin(), "create_plugin_engine"))(plugin);
    plugin->set_device_name("NPU");
}

// Without it the import of a compiled model fails.
EXPORTED void create_extensions(std::vector<std::shared_ptr<ov::Extension>>& extensions) {
    using Create = void (*)(std::vector<std::shared_ptr<ov::Extension>>&);
    reinterpret_cast<Create>(dlsym(open_cpu_plugin(), "create_extensions"))(extensions);
}

// Guards of a kept plan, in C++: the checks and the answers of guards.py, which is their oracle.
//
// On a thousand small tensors a step mostly waits for memory: each parameter, gradient and state is
// a Python object, a TensorImpl and a StorageImpl, far apart. So rows are read in blocks and in
// stages, each of which asks for the memory that the next one reads.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/autograd/python_variable.h>

// Needs Python.h, which torch includes.
#include <structmember.h>

#include <c10/core/impl/LocalDispatchKeySet.h>

namespace {

// Python objects. ---------------------------------------------------------------------------------

// A Python error is set, and is for the caller.
struct PythonError {};

// Owned reference to a Python object.
class Ref {
 public:
  Ref() = default;
  Ref(const Ref& other) : object_(other.object_) { Py_XINCREF(object_); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  static Ref share(PyObject* object) {
    Py_INCREF(object);
    return take(object);
  }

  static Ref take(PyObject* object) {
    if (object == nullptr) throw PythonError();
    Ref ref;
    ref.object_ = object;
    return ref;
  }

  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_ = nullptr;
};

using Refs = std::vector<Ref>;

void require(bool succeeded) {
  if (!succeeded) throw PythonError();
}

// Return a list or tuple of any iterable.
Ref sequence(PyObject* iterable) {
  return Ref::take(PySequence_Fast(iterable, "an iterable is needed"));
}

Refs items(PyObject* iterable) {
  Ref all = sequence(iterable);
  PyObject** first = PySequence_Fast_ITEMS(all.get());
  Py_ssize_t count = PySequence_Fast_GET_SIZE(all.get());
  Refs refs;
  refs.reserve(count);
  for (Py_ssize_t i = 0; i < count; ++i) refs.push_back(Ref::share(first[i]));
  return refs;
}

std::vector<size_t> positions(PyObject* iterable) {
  std::vector<size_t> numbers;
  for (const Ref& item : items(iterable)) {
    numbers.push_back(PyLong_AsSize_t(item.get()));
    require(!PyErr_Occurred());
  }
  return numbers;
}

bool equal(PyObject* one, PyObject* other) {
  if (one == other) return true;
  int answer = PyObject_RichCompareBool(one, other, Py_EQ);
  require(answer >= 0);
  return answer == 1;
}

// Return True if a mapping looks its keys up as a plain dict does.
bool looks_up_as_dict(PyObject* mapping) {
  return PyDict_Check(mapping) &&
      Py_TYPE(mapping)->tp_as_mapping->mp_subscript == PyDict_Type.tp_as_mapping->mp_subscript;
}

// Return mapping[key]; raises as that does.
Ref item(PyObject* mapping, PyObject* key) {
  if (looks_up_as_dict(mapping)) {
    if (PyObject* value = PyDict_GetItemWithError(mapping, key)) return Ref::share(value);
    require(!PyErr_Occurred());
  }
  return Ref::take(PyObject_GetItem(mapping, key));
}

// Clear the errors that guards.py expects of a state that is no dict of tensors.
void forget_expected_error() {
  require(
      PyErr_ExceptionMatches(PyExc_KeyError) || PyErr_ExceptionMatches(PyExc_TypeError) ||
      PyErr_ExceptionMatches(PyExc_AttributeError) || PyErr_ExceptionMatches(PyExc_RuntimeError));
  PyErr_Clear();
}

// An attribute that a class with __slots__ keeps in the object: reading it there takes a tenth of
// the time of asking for it.
class SlotAttribute {
 public:
  explicit SlotAttribute(const char* name) : name_(Ref::take(PyUnicode_InternFromString(name))) {}

  // Find the slot of a class; without one, objects are asked.
  void find_slot(PyTypeObject* type) {
    PyObject* found = PyObject_GetAttr(reinterpret_cast<PyObject*>(type), name_.get());
    if (found == nullptr) return forget_expected_error();
    Ref descriptor = Ref::take(found);
    if (Py_TYPE(found) != &PyMemberDescr_Type) return;
    const PyMemberDef* member = reinterpret_cast<PyMemberDescrObject*>(found)->d_member;
    if (member->type != T_OBJECT_EX) return;
    type_ = Ref::share(reinterpret_cast<PyObject*>(type));
    offset_ = member->offset;
  }

  // Return the attribute; nothing if the object has none.
  Ref of(PyObject* object) const {
    if (has_slot(object)) {
      if (PyObject* value = *slot(object)) return Ref::share(value);
    }
    PyObject* value = PyObject_GetAttr(object, name_.get());
    if (value != nullptr) return Ref::take(value);
    forget_expected_error();
    return Ref();
  }

  // Ask for the memory of the slot.
  void prefetch(PyObject* object) const {
    if (has_slot(object)) __builtin_prefetch(slot(object));
  }

 private:
  bool has_slot(PyObject* object) const {
    return reinterpret_cast<PyObject*>(Py_TYPE(object)) == type_.get();
  }

  PyObject** slot(PyObject* object) const {
    return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_);
  }

  Ref name_;
  Ref type_;
  Py_ssize_t offset_ = 0;
};

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

template <typename Function>
PyObject* translate_errors(Function function) {
  try {
    return function();
  } catch (const PythonError&) {
  } catch (python_error& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

// Tensors. ----------------------------------------------------------------------------------------

constexpr size_t CACHE_LINE = 64;

template <typename T>
void prefetch(const T* place) {
  const char* begin = reinterpret_cast<const char*>(place);
  for (size_t offset = 0; offset < sizeof(T); offset += CACHE_LINE) {
    __builtin_prefetch(begin + offset);
  }
}

void prefetch_object(PyObject* tensor) { prefetch(reinterpret_cast<THPVariable*>(tensor)); }

void prefetch_storage(const c10::TensorImpl& x) {
  if (x.has_storage()) prefetch(x.unsafe_storage().unsafeGetStorageImpl());
}

c10::TensorImpl& impl_of(PyObject* tensor) {
  return *THPVariable_Unpack(tensor).unsafeGetTensorImpl();
}

// Return the type of a tensor's Python object; torch.Tensor while it has none.
PyTypeObject* type_of(const c10::TensorImpl& x) {
  PyObject* object = x.pyobj_slot()->load_pyobj();
  return object == nullptr ? reinterpret_cast<PyTypeObject*>(THPVariableClass) : Py_TYPE(object);
}

// Return true if an object is a torch.Tensor, and of no subclass.
bool is_plain(PyObject* object) {
  return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(THPVariableClass);
}

// Return the address of the first element; nothing if the tensor has no memory of its own.
std::optional<uintptr_t> address_of(c10::TensorImpl& x) {
  try {
    return reinterpret_cast<uintptr_t>(x.mutable_data());
  } catch (const c10::Error&) {
    return std::nullopt;
  }
}

// The layout of a tensor: all that a plan depends on but its address.
struct Layout {
  PyTypeObject* type;
  uint64_t dispatch_keys;
  caffe2::TypeMeta dtype;
  c10::DeviceIndex device;
  bool requires_grad;
  std::vector<int64_t> sizes;
  std::vector<int64_t> strides;
  bool has_elements;
  uintptr_t extent;  // bytes from the first element to the end of the last
};

// The dispatch keys that apply to a tensor in this thread, as torch's own guards compare them.
class DispatchKeys {
 public:
  uint64_t operator()(const c10::TensorImpl& x) const {
    return ((x.key_set() | local_.included_) - local_.excluded_).raw_repr();
  }

 private:
  c10::impl::LocalDispatchKeySet local_ = c10::impl::tls_local_dispatch_key_set();
};

bool has_layout(const c10::TensorImpl& x, const Layout& known, const DispatchKeys& dispatch_keys) {
  if (type_of(x) != known.type || dispatch_keys(x) != known.dispatch_keys ||
      x.dtype() != known.dtype || x.device().index() != known.device ||
      x.requires_grad() != known.requires_grad) {
    return false;
  }
  return x.sizes() == c10::IntArrayRef(known.sizes) &&
      x.strides() == c10::IntArrayRef(known.strides);
}

Layout layout_of(const c10::TensorImpl& x, const DispatchKeys& dispatch_keys) {
  Layout layout{
      type_of(x),     dispatch_keys(x),      x.dtype(),      x.device().index(), x.requires_grad(),
      x.sizes().vec(), x.strides().vec(), x.numel() != 0, 0};
  if (layout.has_elements) {
    int64_t last = 0;
    for (size_t dim = 0; dim < layout.sizes.size(); ++dim) {
      last += layout.strides[dim] * (layout.sizes[dim] - 1);
    }
    layout.extent = (last + 1) * x.itemsize();
  }
  return layout;
}

// Owner of layouts, one of each kind: the layouts of a thousand like tensors stay in the cache.
class Layouts {
 public:
  const Layout* intern(Layout layout) {
    std::string key;
    auto add = [&key](const auto& value) {
      key.append(reinterpret_cast<const char*>(&value), sizeof(value));
    };
    add(layout.type);
    add(layout.dispatch_keys);
    add(layout.dtype);
    add(layout.device);
    add(layout.requires_grad);
    for (const auto* numbers : {&layout.sizes, &layout.strides}) {
      for (int64_t number : *numbers) add(number);
    }
    auto& place = known_[key];
    if (!place) place = std::make_unique<Layout>(std::move(layout));
    return place.get();
  }

 private:
  std::map<std::string, std::unique_ptr<Layout>> known_;
};

// The memory that parameters and states span, in order of address.
class Spans {
 public:
  void add(uintptr_t begin, uintptr_t extent) {
    if (extent != 0) spans_.emplace_back(begin, begin + extent);
  }

  void sort() {
    std::sort(spans_.begin(), spans_.end());
    uintptr_t end = 0;
    for (const auto& span : spans_) {
      overlap_ |= span.first < end;
      end = std::max(end, span.second);
    }
  }

  // Return True if a span surely overlaps none of these, nor do they each other.
  //
  // `gap` is the number of spans before it in the last call, and is updated.
  bool is_apart(uintptr_t begin, uintptr_t extent, size_t& gap) const {
    if (overlap_) return false;
    if (extent == 0) return true;
    if (!fits(begin, begin + extent, gap)) {
      // As spans do not overlap, their ends are sorted, too.
      gap = std::partition_point(
                spans_.begin(), spans_.end(), [&](const auto& s) { return s.second <= begin; }) -
          spans_.begin();
    }
    return fits(begin, begin + extent, gap);
  }

 private:
  bool fits(uintptr_t begin, uintptr_t end, size_t gap) const {
    return (gap == 0 || spans_[gap - 1].second <= begin) &&
        (gap == spans_.size() || end <= spans_[gap].first);
  }

  std::vector<std::pair<uintptr_t, uintptr_t>> spans_;
  bool overlap_ = false;
};

// The tensors of a launch. ------------------------------------------------------------------------

// The tensors of a launch in one step: the twin of StepTensors in launch.py.
struct StepTensors {
  size_t keys = 0;     // tensors of a parameter's state
  size_t scalars = 0;  // those of them, at the front, that are scalars
  Refs params;
  std::vector<at::Tensor> gradients;
  Refs states;
  Refs sharded;
  std::vector<uintptr_t> gradient_addresses;
  bool disjoint = true;
};

// The answers of guards.py, worst first: the first that applies is given.
enum Answer {
  NO_STATE,
  OTHER_SHARDING,
  NO_MEMORY,
  OTHER_ADDRESS,
  OTHER_LAYOUT,
  FRESH,
};

const char* reason(Answer answer) {
  switch (answer) {
    case NO_STATE:
    case NO_MEMORY:
      return "a state is missing, or is no tensor";
    case OTHER_SHARDING:
      return "a DTensor has another mesh, or other placements";
    case OTHER_ADDRESS:
      return "a parameter or state has another address";
    case OTHER_LAYOUT:
      return "a tensor has another dtype, shape, stride or device";
    case FRESH:
      break;
  }
  return nullptr;
}

// The tensors of a step, before they are sorted into launches.
struct Members {
  Refs params;
  std::vector<at::Tensor> gradients;  // undefined where a parameter has none
  Refs states;                        // the values of optimizer.state
};

// The record of one launch.
class LaunchGuard {
 public:
  // `places` is a tuple: the positions of the launch's parameters, of their states, the keys of a
  // state, the number of scalars, and True if the parameters are DTensors.
  LaunchGuard(PyObject* places, PyObject* spec_fields) : spec_fields_(items(spec_fields)) {
    PyObject *params, *states, *keys;
    require(PyArg_ParseTuple(places, "OOOnp", &params, &states, &keys, &scalars_, &is_sharded_));
    params_ = positions(params);
    states_ = positions(states);
    keys_ = items(keys);
    gaps_.resize(params_.size());
  }

  // Record the tensors of the launch as they are.
  void record(Members& members, Layouts& layouts) {
    for (size_t param : params_) require_gradient(members.gradients.at(param));
    if (is_sharded_ && !params_.empty()) {
      PyTypeObject* type = Py_TYPE(members.params.at(params_[0]).get());
      local_tensor_.find_slot(type);
      spec_.find_slot(type);
    }
    StepTensors found = empty();
    DispatchKeys dispatch_keys;
    for (size_t begin = 0; begin < params_.size(); begin += BLOCK) {
      Block block = read(members, begin, found);
      if (block.answer != FRESH) fail(block.answer);
      for (const Ref& spec : block.specs) specs_.push_back({spec, fields_of(spec)});
      for (c10::TensorImpl* x : block.tensors) {
        auto address = address_of(*x);
        if (!address) fail(NO_MEMORY);
        addresses_.push_back(*address);
        layouts_.push_back(layouts.intern(layout_of(*x, dispatch_keys)));
      }
      for (c10::TensorImpl* g : block.gradients) {
        gradient_layouts_.push_back(layouts.intern(layout_of(*g, dispatch_keys)));
      }
    }
    size_t columns = 1 + keys_.size();
    for (size_t i = 0; i < addresses_.size(); ++i) {
      bool is_scalar = i % columns >= 1 && i % columns < 1 + static_cast<size_t>(scalars_);
      if (!is_scalar) spans_.add(addresses_[i], layouts_[i]->extent);
    }
    spans_.sort();
  }

  // Find the tensors of the launch, and compare them with the record.
  Answer find(Members& members, StepTensors& found) {
    found = empty();
    DispatchKeys dispatch_keys;
    Answer answer = FRESH;
    for (size_t begin = 0; begin < params_.size(); begin += BLOCK) {
      Block block = read(members, begin, found);
      // Once something is stale, only a worse answer matters.
      answer = std::min(answer, std::min(block.answer, compare_specs(block, begin)));
      if (block.answer == FRESH && answer > OTHER_SHARDING) {
        answer = std::min(answer, compare(block, begin, dispatch_keys, found));
      }
    }
    return answer;
  }

 private:
  static constexpr size_t BLOCK = 64;

  // The spec of a DTensor, with its attributes.
  struct Spec {
    Ref object;
    Refs fields;
  };

  // The tensors of a block of rows, local parts of DTensors.
  struct Block {
    std::vector<c10::TensorImpl*> tensors;  // row by row: the parameter, and its states
    std::vector<c10::TensorImpl*> gradients;
    Refs specs;  // row by row: of the parameter, its gradient, and its states that are no scalars
    Answer answer = FRESH;
  };

  [[noreturn]] static void fail(Answer answer) {
    PyErr_SetString(PyExc_RuntimeError, reason(answer));
    throw PythonError();
  }

  static void require_gradient(const at::Tensor& gradient) {
    if (gradient.defined()) return;
    PyErr_SetString(PyExc_RuntimeError, "a parameter of a launch has no gradient");
    throw PythonError();
  }

  StepTensors empty() const {
    StepTensors found;
    found.keys = keys_.size();
    found.scalars = scalars_;
    found.params.reserve(params_.size());
    found.gradients.reserve(params_.size());
    found.gradient_addresses.reserve(params_.size());
    found.states.reserve(params_.size() * keys_.size());
    return found;
  }

  // Read a block of rows: append its tensors to `found`, and return them.
  Block read(Members& members, size_t begin, StepTensors& found) const {
    size_t end = std::min(begin + BLOCK, params_.size());
    for (size_t row = begin; row < end; ++row) {
      prefetch(members.gradients[params_[row]].unsafeGetTensorImpl());
      PyObject* state = members.states[states_[row]].get();
      if (PyDict_Check(state)) {
        __builtin_prefetch(reinterpret_cast<PyDictObject*>(state)->ma_keys);
      }
    }
    bool has_all = true;
    for (size_t row = begin; row < end; ++row) {
      found.params.push_back(members.params[params_[row]]);
      found.gradients.push_back(std::move(members.gradients[params_[row]]));
      for (const Ref& key : keys_) {
        found.states.push_back(state_tensor(members.states[states_[row]].get(), key.get()));
        has_all &= found.states.back().get() != nullptr;
        prefetch_object(found.states.back().get());
      }
    }
    Block block;
    has_all = has_all && (!is_sharded_ || unwrap(begin, end, block, found)) &&
        all_tensors(found.params, begin, end) &&
        all_tensors(found.states, begin * keys_.size(), end * keys_.size());
    if (!has_all) {
      block.answer = NO_STATE;
      return block;
    }
    block.tensors.reserve((end - begin) * (1 + keys_.size()));
    block.gradients.reserve(end - begin);
    for (size_t row = begin; row < end; ++row) {
      block.tensors.push_back(&impl_of(found.params[row].get()));
      for (size_t key = 0; key < keys_.size(); ++key) {
        block.tensors.push_back(&impl_of(found.states[row * keys_.size() + key].get()));
      }
      block.gradients.push_back(found.gradients[row].unsafeGetTensorImpl());
    }
    for (c10::TensorImpl* x : block.tensors) prefetch_storage(*x);
    for (c10::TensorImpl* g : block.gradients) prefetch_storage(*g);
    return block;
  }

  // Put the local parts of DTensors in their place, and keep their specs; return false if there is
  // no such part.
  bool unwrap(size_t begin, size_t end, Block& block, StepTensors& found) const {
    Refs gradients;
    gradients.reserve(end - begin);
    for (size_t row = begin; row < end; ++row) {
      gradients.push_back(Ref::take(THPVariable_Wrap(found.gradients[row])));
      local_tensor_.prefetch(gradients.back().get());
      local_tensor_.prefetch(found.params[row].get());
    }
    block.specs.reserve((end - begin) * (2 + keys_.size() - scalars_));
    for (size_t row = begin; row < end; ++row) {
      found.sharded.push_back(found.params[row]);
      if (!take_part(found.params[row], block) || !take_part(gradients[row - begin], block)) {
        return false;
      }
      Ref* states = &found.states[row * keys_.size()];
      for (size_t key = 0; key < keys_.size(); ++key) {
        if (key >= static_cast<size_t>(scalars_)) {
          found.sharded.push_back(states[key]);
          if (!take_part(states[key], block)) return false;
        } else if (!is_plain(states[key].get())) {
          states[key] = local_tensor_.of(states[key].get());
        }
      }
    }
    if (!all_tensors(gradients, 0, gradients.size())) return false;
    for (size_t row = begin; row < end; ++row) {
      found.gradients[row] = THPVariable_Unpack(gradients[row - begin].get());
    }
    return true;
  }

  // Replace a DTensor by its local part, and keep its spec; return false if it is none.
  bool take_part(Ref& tensor, Block& block) const {
    Ref spec = spec_.of(tensor.get());
    Ref part = local_tensor_.of(tensor.get());
    if (spec.get() == nullptr || part.get() == nullptr) return false;
    prefetch_object(part.get());
    block.specs.push_back(std::move(spec));
    tensor = std::move(part);
    return true;
  }

  // Return true if all are tensors; the contents of each are asked for.
  static bool all_tensors(const Refs& refs, size_t begin, size_t end) {
    for (size_t i = begin; i < end; ++i) {
      PyObject* object = refs[i].get();
      if (object == nullptr || !THPVariable_Check(object)) return false;
      prefetch(&impl_of(object));
    }
    return true;
  }

  // Return state[key]; nothing if there is none, or if the state is no mapping.
  static Ref state_tensor(PyObject* state, PyObject* key) {
    try {
      return item(state, key);
    } catch (const PythonError&) {
      forget_expected_error();
      return Ref();
    }
  }

  Answer compare_specs(const Block& block, size_t begin) const {
    if (!is_sharded_ || block.answer != FRESH) return FRESH;
    size_t first = begin * (2 + keys_.size() - scalars_);
    for (size_t i = 0; i < block.specs.size(); ++i) {
      if (!is_same_spec(block.specs[i].get(), specs_[first + i])) return OTHER_SHARDING;
    }
    return FRESH;
  }

  Refs fields_of(const Ref& spec) const {
    Refs fields;
    for (const Ref& name : spec_fields_) {
      fields.push_back(Ref::take(PyObject_GetAttr(spec.get(), name.get())));
    }
    return fields;
  }

  // Compare the spec of a DTensor: field by field, as its == is a slow Python function.
  bool is_same_spec(PyObject* spec, const Spec& known) const {
    if (spec == known.object.get()) return true;
    if (Py_TYPE(spec) == Py_TYPE(known.object.get()) && !spec_fields_.empty()) {
      bool same = true;
      for (size_t i = 0; same && i < spec_fields_.size(); ++i) {
        Ref field = Ref::take(PyObject_GetAttr(spec, spec_fields_[i].get()));
        same = equal(field.get(), known.fields[i].get());
      }
      if (same) return true;
    }
    return equal(spec, known.object.get());
  }

  // Compare addresses and layouts, and keep the gradients' addresses.
  Answer compare(
      const Block& block, size_t begin, const DispatchKeys& dispatch_keys, StepTensors& found) {
    Answer answer = FRESH;
    size_t first = begin * (1 + keys_.size());
    for (size_t i = 0; i < block.tensors.size(); ++i) {
      c10::TensorImpl& x = *block.tensors[i];
      auto address = address_of(x);
      if (!address) return NO_MEMORY;
      if (*address != addresses_[first + i]) answer = std::min(answer, OTHER_ADDRESS);
      if (!has_layout(x, *layouts_[first + i], dispatch_keys)) {
        answer = std::min(answer, OTHER_LAYOUT);
      }
    }
    for (size_t i = 0; i < block.gradients.size(); ++i) {
      const Layout& known = *gradient_layouts_[begin + i];
      if (!has_layout(*block.gradients[i], known, dispatch_keys)) {
        answer = std::min(answer, OTHER_LAYOUT);
      }
      if (answer != FRESH) continue;
      uintptr_t address = reinterpret_cast<uintptr_t>(block.gradients[i]->mutable_data());
      found.gradient_addresses.push_back(address);
      bool has_memory = address != 0 || known.extent == 0;
      found.disjoint &= has_memory && spans_.is_apart(address, known.extent, gaps_[begin + i]);
    }
    return answer;
  }

  std::vector<size_t> params_;
  std::vector<size_t> states_;
  Refs keys_;
  Py_ssize_t scalars_ = 0;
  int is_sharded_ = 0;
  Refs spec_fields_;
  SlotAttribute local_tensor_{"_local_tensor"};
  SlotAttribute spec_{"_spec"};
  // Row by row, as in Block.
  std::vector<Spec> specs_;
  std::vector<uintptr_t> addresses_;
  std::vector<const Layout*> layouts_;
  std::vector<const Layout*> gradient_layouts_;
  Spans spans_;
  std::vector<size_t> gaps_;
};

// The record of a plan. ---------------------------------------------------------------------------

// The record of everything a plan depends on: the twin of Guards and GivenGuards in guards.py.
class Guards {
 public:
  // `flags` and `amounts` are the names of options; the rest is as in the Python twins.
  Guards(
      PyObject* groups, PyObject* source, bool is_given, PyObject* launches, PyObject* flags,
      PyObject* amounts, PyObject* is_off, PyObject* variables, PyObject* spec_fields)
      : is_given_(is_given),
        flag_names_(items(flags)),
        amount_names_(items(amounts)),
        is_off_(Ref::share(is_off)),
        params_key_(Ref::take(PyUnicode_InternFromString("params"))) {
    for (const Ref& name : items(variables)) {
      const char* text = PyUnicode_AsUTF8(name.get());
      require(text != nullptr);
      variables_.emplace_back(text, variable(text));
    }
    for (const Ref& places : items(launches)) launches_.emplace_back(places.get(), spec_fields);
    Refs all = items(groups);
    Members members;
    for (const Ref& group : all) {
      size_t before = members.params.size();
      append_params(group.get(), members.params);
      counts_.push_back(members.params.size() - before);
      for (const Ref& name : flag_names_) flags_.push_back(item(group.get(), name.get()));
      for (const Ref& name : amount_names_) amounts_.push_back(item(group.get(), name.get()));
    }
    for (const Ref& param : members.params) params_.push_back(param.get());
    if (is_given_) {
      indices_ = read_given(source, members);
    } else {
      state_keys_ = read_state(source, members.states);
      read_gradients(members);
    }
    for (const at::Tensor& g : members.gradients) has_gradient_.push_back(g.defined());
    for (LaunchGuard& launch : launches_) launch.record(members, layouts_);
  }

  // Find the tensors of each launch; return the reason if the plan is stale.
  std::optional<std::string> find(
      PyObject* groups, PyObject* source, std::vector<StepTensors>& found) {
    Members members;
    if (!is_given_ && !begins_with(read_state(source, members.states), state_keys_)) {
      return "optimizer.state has other keys";
    }
    if (auto stale = find_params(groups, members.params)) return stale;
    if (!is_given_) {
      read_gradients(members);
    } else if (read_given(source, members) != indices_) {
      return "other parameters have a gradient";
    }
    if (!has_same_gradients(members)) return "other parameters have a gradient";
    for (LaunchGuard& launch : launches_) {
      Answer answer = launch.find(members, found.emplace_back());
      if (answer != FRESH) return reason(answer);
    }
    return std::nullopt;
  }

 private:
  void append_params(PyObject* group, Refs& params) const {
    Ref own = sequence(item(group, params_key_.get()).get());
    PyObject** first = PySequence_Fast_ITEMS(own.get());
    Py_ssize_t count = PySequence_Fast_GET_SIZE(own.get());
    append(first, count, params);
  }

  // Take references: each is written into an object, which may be far away.
  static void append(PyObject** first, size_t count, Refs& refs) {
    constexpr size_t AHEAD = 16;
    refs.reserve(std::max(refs.capacity(), refs.size() + count));
    for (size_t i = 0; i < count; ++i) {
      if (i + AHEAD < count) __builtin_prefetch(first[i + AHEAD]);
      refs.push_back(Ref::share(first[i]));
    }
  }

  // Compare groups and variables, and return the parameters of all groups.
  std::optional<std::string> find_params(PyObject* groups, Refs& params) const {
    for (const auto& [name, value] : variables_) {
      if (variable(name.c_str()) != value) {
        return "an environment variable that chooses backends has changed";
      }
    }
    Refs all = items(groups);
    std::vector<size_t> counts;
    params.reserve(params_.size());
    for (const Ref& group : all) {
      size_t before = params.size();
      append_params(group.get(), params);
      counts.push_back(params.size() - before);
    }
    bool same = counts == counts_ && params.size() == params_.size();
    for (size_t i = 0; same && i < params.size(); ++i) same = params[i].get() == params_[i];
    if (!same) return "the param groups have other parameters";
    for (size_t i = 0; i < flags_.size(); ++i) {
      PyObject* group = all[i / flag_names_.size()].get();
      Ref flag = item(group, flag_names_[i % flag_names_.size()].get());
      if (!equal(flag.get(), flags_[i].get())) {
        return "an option that changes what runs has another value";
      }
    }
    for (size_t name = 0; name < amount_names_.size(); ++name) {
      for (size_t i = 0; i < all.size(); ++i) {
        Ref amount = item(all[i].get(), amount_names_[name].get());
        if (is_off(amount.get()) != is_off(amounts_[i * amount_names_.size() + name].get())) {
          const char* text = PyUnicode_AsUTF8(amount_names_[name].get());
          require(text != nullptr);
          return std::string(text) + " was turned on or off";
        }
      }
    }
    return std::nullopt;
  }

  bool is_off(PyObject* amount) const {
    if (PyFloat_CheckExact(amount)) return PyFloat_AS_DOUBLE(amount) == 0.0;
    Ref answer = Ref::take(PyObject_CallOneArg(is_off_.get(), amount));
    int truth = PyObject_IsTrue(answer.get());
    require(truth >= 0);
    return truth == 1;
  }

  // Return the keys of optimizer.state, for comparison only; read its values.
  static std::vector<PyObject*> read_state(PyObject* state, Refs& values) {
    std::vector<PyObject*> keys, found;
    if (PyDict_Check(state)) {
      keys.reserve(PyDict_GET_SIZE(state));
      found.reserve(PyDict_GET_SIZE(state));
      PyObject *key, *value;
      Py_ssize_t place = 0;
      while (PyDict_Next(state, &place, &key, &value)) {
        keys.push_back(key);
        found.push_back(value);
      }
      append(found.data(), found.size(), values);
    } else {
      for (const Ref& key : items(Ref::take(PyMapping_Keys(state)).get())) {
        keys.push_back(key.get());
      }
      values = items(Ref::take(PyMapping_Values(state)).get());
    }
    return keys;
  }

  // Return true if the first keys are the known ones. Other parameters may have got a state since.
  static bool begins_with(
      const std::vector<PyObject*>& keys, const std::vector<PyObject*>& known) {
    return keys.size() >= known.size() && std::equal(known.begin(), known.end(), keys.begin());
  }

  // Read parameters, gradients and states from what torch.compile gives: a list of tuples (index,
  // parameter, gradient, group, state). Return the indices.
  static std::vector<size_t> read_given(PyObject* given, Members& members) {
    std::vector<size_t> indices;
    members.params.clear();
    for (const Ref& each : items(given)) {
      PyObject *param, *gradient, *group, *state;
      Py_ssize_t index;
      require(PyArg_ParseTuple(each.get(), "nOOOO", &index, &param, &gradient, &group, &state));
      check_tensor(param);
      check_tensor(gradient);
      indices.push_back(index);
      members.params.push_back(Ref::share(param));
      members.gradients.push_back(THPVariable_Unpack(gradient));
      members.states.push_back(Ref::share(state));
    }
    return indices;
  }

  static void check_tensor(PyObject* object) {
    if (!THPVariable_Check(object)) {
      PyErr_Format(PyExc_TypeError, "a tensor is needed, but got %R", Py_TYPE(object));
      throw PythonError();
    }
  }

  static void read_gradients(Members& members) {
    constexpr size_t BLOCK = 64;
    size_t count = members.params.size();
    members.gradients.resize(count);
    for (size_t begin = 0; begin < count; begin += BLOCK) {
      size_t end = std::min(begin + BLOCK, count);
      for (size_t i = begin; i < end; ++i) {
        check_tensor(members.params[i].get());
        prefetch(&impl_of(members.params[i].get()));
      }
      for (size_t i = begin; i < end; ++i) {
        c10::TensorImpl& p = impl_of(members.params[i].get());
        if (auto* meta = p.autograd_meta()) {
          prefetch(static_cast<torch::autograd::AutogradMeta*>(meta));
        }
        prefetch_storage(p);
      }
      for (size_t i = begin; i < end; ++i) {
        c10::TensorImpl& p = impl_of(members.params[i].get());
        if (p.autograd_meta()) __builtin_prefetch(p.autograd_meta()->grad().unsafeGetTensorImpl());
      }
      for (size_t i = begin; i < end; ++i) {
        c10::TensorImpl& p = impl_of(members.params[i].get());
        if (p.autograd_meta()) members.gradients[i] = p.autograd_meta()->grad();
      }
    }
  }

  bool has_same_gradients(const Members& members) const {
    for (size_t i = 0; i < has_gradient_.size(); ++i) {
      if (members.gradients[i].defined() != has_gradient_[i]) return false;
    }
    return true;
  }

  bool is_given_;
  Refs flag_names_;
  Refs amount_names_;
  Ref is_off_;
  Ref params_key_;
  std::vector<std::pair<std::string, std::optional<std::string>>> variables_;
  Layouts layouts_;
  std::vector<LaunchGuard> launches_;
  // Objects of the user are known by address only, so that they are freed when they are dropped.
  std::vector<PyObject*> params_;
  std::vector<size_t> counts_;
  Refs flags_;    // group by group
  Refs amounts_;  // group by group
  std::vector<PyObject*> state_keys_;
  std::vector<size_t> indices_;
  std::vector<bool> has_gradient_;
};

// Python types. -----------------------------------------------------------------------------------

template <typename Content>
struct Object {
  PyObject_HEAD
  Content* content;
};

template <typename Content>
Content& content_of(PyObject* self) {
  return *reinterpret_cast<Object<Content>*>(self)->content;
}

template <typename Content>
void free_object(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  delete reinterpret_cast<Object<Content>*>(self)->content;
  type->tp_free(self);
  Py_DECREF(type);
}

// Make an object of a type; the content is its own.
template <typename Content>
Ref object_of(PyTypeObject* type, std::unique_ptr<Content> content) {
  Ref self = Ref::take(type->tp_alloc(type, 0));
  reinterpret_cast<Object<Content>*>(self.get())->content = content.release();
  return self;
}

PyObject* list_of(const Refs& refs) {
  Ref list = Ref::take(PyList_New(refs.size()));
  for (size_t i = 0; i < refs.size(); ++i) {
    PyList_SET_ITEM(list.get(), i, Ref(refs[i]).release());
  }
  return list.release();
}

PyObject* get_params(PyObject* self, void*) {
  return translate_errors([&] { return list_of(content_of<StepTensors>(self).params); });
}

PyObject* get_gradients(PyObject* self, void*) {
  return translate_errors([&] {
    Refs gradients;
    for (const at::Tensor& g : content_of<StepTensors>(self).gradients) {
      gradients.push_back(Ref::take(THPVariable_Wrap(g)));
    }
    return list_of(gradients);
  });
}

PyObject* get_states(PyObject* self, void*) {
  return translate_errors([&] { return list_of(content_of<StepTensors>(self).states); });
}

PyObject* get_sharded(PyObject* self, void*) {
  return translate_errors([&] { return list_of(content_of<StepTensors>(self).sharded); });
}

PyObject* get_disjoint(PyObject* self, void*) {
  return PyBool_FromLong(content_of<StepTensors>(self).disjoint);
}

PyObject* write_addresses(PyObject* self, PyObject* out) {
  return translate_errors([&]() -> PyObject* {
    const auto& addresses = content_of<StepTensors>(self).gradient_addresses;
    Py_buffer view;
    require(PyObject_GetBuffer(out, &view, PyBUF_STRIDED | PyBUF_WRITABLE) == 0);
    bool fits = view.ndim == 1 && view.itemsize == sizeof(uintptr_t) &&
        static_cast<size_t>(view.shape[0]) == addresses.size();
    char* place = static_cast<char*>(view.buf);
    for (size_t i = 0; fits && i < addresses.size(); ++i, place += view.strides[0]) {
      std::memcpy(place, &addresses[i], sizeof(uintptr_t));
    }
    PyBuffer_Release(&view);
    if (!fits) {
      PyErr_Format(PyExc_ValueError, "an array of %zu addresses is needed", addresses.size());
      return nullptr;
    }
    Py_RETURN_NONE;
  });
}

PyObject* increment_versions(PyObject* self, PyObject*) {
  return translate_errors([&]() -> PyObject* {
    const StepTensors& tensors = content_of<StepTensors>(self);
    for (const Ref& param : tensors.params) impl_of(param.get()).bump_version();
    for (size_t i = 0; i < tensors.states.size(); ++i) {
      if (i % tensors.keys >= tensors.scalars) impl_of(tensors.states[i].get()).bump_version();
    }
    Py_RETURN_NONE;
  });
}

PyObject* increment_sharded_versions(PyObject* self, PyObject*) {
  return translate_errors([&]() -> PyObject* {
    for (const Ref& x : content_of<StepTensors>(self).sharded) impl_of(x.get()).bump_version();
    Py_RETURN_NONE;
  });
}

PyGetSetDef step_tensors_attributes[] = {
    {"params", get_params, nullptr, "The parameters.", nullptr},
    {"gradients", get_gradients, nullptr, "The gradient of each.", nullptr},
    {"states", get_states, nullptr, "The states, one parameter's after the other's.", nullptr},
    {"sharded", get_sharded, nullptr, "The DTensors among parameters and states.", nullptr},
    {"disjoint", get_disjoint, nullptr, "True if surely all have memory and none overlaps.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};

PyMethodDef step_tensors_methods[] = {
    {"write_addresses", write_addresses, METH_O, "Write the gradients' addresses to an array."},
    {"increment_versions", increment_versions, METH_NOARGS, "Tell autograd of a write."},
    {"increment_sharded_versions", increment_sharded_versions, METH_NOARGS,
     "Tell autograd of a write to the local parts of DTensors."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot step_tensors_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(free_object<StepTensors>)},
    {Py_tp_getset, step_tensors_attributes},
    {Py_tp_methods, step_tensors_methods},
    {Py_tp_doc, const_cast<char*>("The tensors of a launch in one step.")},
    {0, nullptr},
};

PyType_Spec step_tensors_spec = {
    "stepforge._guards.StepTensors", sizeof(Object<StepTensors>), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, step_tensors_slots};

PyTypeObject* step_tensors_type = nullptr;

PyObject* new_guards(PyTypeObject* type, PyObject* args, PyObject*) {
  return translate_errors([&] {
    PyObject *groups, *source, *launches, *flags, *amounts, *is_off, *variables, *spec_fields;
    int is_given;
    require(PyArg_ParseTuple(
        args, "OOpOOOOOO", &groups, &source, &is_given, &launches, &flags, &amounts, &is_off,
        &variables, &spec_fields));
    auto guards = std::make_unique<Guards>(
        groups, source, is_given, launches, flags, amounts, is_off, variables, spec_fields);
    return object_of(type, std::move(guards)).release();
  });
}

PyObject* find(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return translate_errors([&]() -> PyObject* {
    if (count != 2) {
      PyErr_Format(PyExc_TypeError, "find takes 2 arguments, but got %zd", count);
      return nullptr;
    }
    std::vector<StepTensors> found;
    if (auto stale = content_of<Guards>(self).find(args[0], args[1], found)) {
      return PyUnicode_FromStringAndSize(stale->data(), stale->size());
    }
    Refs launches;
    for (StepTensors& each : found) {
      launches.push_back(
          object_of(step_tensors_type, std::make_unique<StepTensors>(std::move(each))));
    }
    return list_of(launches);
  });
}

PyMethodDef guards_methods[] = {
    {"find", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(find)), METH_FASTCALL,
     "Return the tensors of each launch in the next step; or why the plan is stale."},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot guards_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(new_guards)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_object<Guards>)},
    {Py_tp_methods, guards_methods},
    {Py_tp_doc, const_cast<char*>("The record of everything a plan depends on.")},
    {0, nullptr},
};

PyType_Spec guards_spec = {
    "stepforge._guards.Guards", sizeof(Object<Guards>), 0, Py_TPFLAGS_DEFAULT, guards_slots};

PyModuleDef module_definition = {
    PyModuleDef_HEAD_INIT, "_guards", "Guards of a kept plan.", -1, nullptr,
    nullptr,               nullptr,   nullptr,                  nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__guards() {
  return translate_errors([&] {
    Ref module = Ref::take(PyModule_Create(&module_definition));
    Ref tensors = Ref::take(PyType_FromSpec(&step_tensors_spec));
    Ref guards = Ref::take(PyType_FromSpec(&guards_spec));
    step_tensors_type = reinterpret_cast<PyTypeObject*>(Ref(tensors).release());
    require(PyModule_AddObjectRef(module.get(), "StepTensors", tensors.get()) == 0);
    require(PyModule_AddObjectRef(module.get(), "Guards", guards.get()) == 0);
    return module.release();
  });
}

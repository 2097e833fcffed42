// Style transfer in C++: an exported closure in TorchScript, and libtorch's L-BFGS.
//
//     stylize PHOTO.ppm STYLE.ppm [--models ../models] [--out stylized.ppm] [--size 256] [--iterations 60]
//
// Pictures are (1, 3, H, W), RGB, float in [0, 1]; files are PPM (P6, 8 bits), so that no image library is needed.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <iostream>
#include <limits>
#include <map>
#include <regex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <torch/optim/lbfgs.h>
#include <torch/script.h>
#include <torch/version.h>

namespace {

using Layers = c10::Dict<std::string, at::Tensor>;

constexpr double content_weight = 1;
constexpr double style_weight = 20;
constexpr double tv_weight = 200;
constexpr int history = 20;
constexpr int benchmark_calls = 7;

// Relative weights of layers; 1 for any other.
const std::map<std::string, double> style_layer_weights = {
    {"relu1_1", 256}, {"relu2_1", 64}, {"relu3_1", 16}, {"relu4_1", 4}, {"relu5_1", 1}};

struct Options {
  std::filesystem::path photo;
  std::filesystem::path style;
  std::filesystem::path models = "../models";
  std::filesystem::path out = "stylized.ppm";
  std::filesystem::path start;     // the photograph if empty
  std::filesystem::path evaluate;  // where the gradient goes
  std::int64_t size = 256;
  int iterations = 60;
  bool benchmark = false;
};

struct Evaluation {
  double total;
  at::Tensor gradient;
};

at::Tensor read_ppm(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + " cannot be opened");
  const auto number = [&] {
    while ((file >> std::ws).peek() == '#') file.ignore(std::numeric_limits<std::streamsize>::max(), '\n');
    std::int64_t value = 0;
    file >> value;
    return value;
  };
  std::string magic(2, ' ');
  file.read(magic.data(), 2);
  const auto width = number(), height = number(), maximum = number();
  if (magic != "P6" || !file || width < 1 || height < 1 || width > 1 << 15 || height > 1 << 15 || maximum != 255)
    throw std::runtime_error(path.string() + " is not an 8-bit PPM (P6); `convert picture.jpg -depth 8 picture.ppm` makes one");
  file.ignore(1);
  const auto pixels = at::empty({height, width, 3}, at::kByte);
  file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel());
  if (file.gcount() != pixels.numel()) throw std::runtime_error(path.string() + " ends too early");
  return pixels.permute({2, 0, 1}).unsqueeze(0).to(at::kFloat).div(255).contiguous();
}

void write_ppm(const std::filesystem::path& path, const at::Tensor& picture) {
  const auto pixels = picture[0].clamp(0, 1).mul(255).round().to(at::kByte).permute({1, 2, 0}).contiguous();
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << pixels.size(1) << ' ' << pixels.size(0) << "\n255\n";
  file.write(static_cast<const char*>(pixels.data_ptr()), pixels.numel());
  if (!file.flush()) throw std::runtime_error(path.string() + " cannot be written");
}

// Returns a picture whose longer edge is `edge` pixels.
at::Tensor scaled(const at::Tensor& picture, std::int64_t edge) {
  const double factor = static_cast<double>(edge) / std::max(picture.size(2), picture.size(3));
  const auto of = [&](std::int64_t length) { return std::max<std::int64_t>(16, std::lround(length * factor)); };
  const std::vector<std::int64_t> size = {of(picture.size(2)), of(picture.size(3))};
  if (picture.sizes().slice(2) == at::IntArrayRef(size)) return picture;
  return at::_upsample_bicubic2d_aa(picture, size, /*align_corners=*/false).clamp(0, 1);
}

// One exported graph, and what its file says of itself.
class Graph {
 public:
  Graph(const std::filesystem::path& folder, const std::string& name) {
    const auto path = (folder / (name + ".pt")).string();
    if (!std::filesystem::exists(path)) throw std::runtime_error(path + " does not exist");
    torch::jit::ExtraFilesMap extra = {{"nst.json", ""}};
    try {
      module_ = torch::jit::load(path, at::kCPU, extra);
    } catch (const c10::Error&) {
      throw std::runtime_error(path + " is no TorchScript file");
    }
    description_ = extra["nst.json"];
    if (described("graph") != name) throw std::runtime_error(path + " is not the graph " + name);
    module_.eval();
  }

  c10::IValue operator()(std::vector<c10::IValue> arguments) { return module_.forward(std::move(arguments)); }

  std::vector<std::string> layers(const std::string& role) const {
    std::vector<std::string> names;
    for (const auto& name : module_.attr(role).toListRef()) names.push_back(name.toStringRef());
    return names;
  }

  // One value of the description, empty if there is none: for two of them no JSON library is needed.
  std::string described(const std::string& key) const {
    std::smatch found;
    std::regex_search(description_, found, std::regex("\"" + key + "\":\"?(\\w+)"));
    return found[1];
  }

 private:
  torch::jit::Module module_;
  std::string description_;
};

// What is minimized: the exported closure, with what a photograph and a style make it compare the picture with.
class Objective {
 public:
  Objective(const std::filesystem::path& models, const at::Tensor& photo, const at::Tensor& style)
      : closure_(models, "closure"), margin_(std::stoll(closure_.described("margin_px"))) {
    const auto features = Graph(models, "features")({with_margin(photo)}).to<Layers>();
    const auto grams = Graph(models, "grams")({with_margin(style)}).to<Layers>();
    std::vector<double> content_weights, style_weights;
    for (const auto& layer : closure_.layers("content_layers")) {
      if (!features.contains(layer)) throw std::runtime_error("features.pt has no " + layer + ", which closure.pt asks for");
      content_.insert(layer, features.at(layer));
      content_weights.push_back(1);
    }
    for (const auto& layer : closure_.layers("style_layers")) {
      if (!grams.contains(layer + ".gram"))
        throw std::runtime_error("grams.pt has no " + layer + ", which closure.pt asks for");
      style_.insert(layer, grams.at(layer + ".gram")[0]);
      const auto found = style_layer_weights.find(layer);
      style_weights.push_back(found == style_layer_weights.end() ? 1 : found->second);
    }
    content_weights_ = shares(content_weights, content_weight);
    style_weights_ = shares(style_weights, style_weight);
  }

  // Returns the loss of a picture with its margin, and its gradient.
  Evaluation operator()(const at::Tensor& image) {
    const auto tv = at::scalar_tensor(tv_weight, at::kFloat);
    const auto results = closure_({image, content_, style_, content_weights_, style_weights_, tv}).toTuple();
    return {results->elements().at(0).toTensor().item<double>(), results->elements().at(4).toTensor()};
  }

  // At the edge of what a network sees its features mean something else, so some models want the picture continued.
  at::Tensor with_margin(const at::Tensor& picture) const {
    if (margin_ == 0) return picture;
    return picture.index_select(2, to_and_fro(picture.size(2))).index_select(3, to_and_fro(picture.size(3)));
  }

  at::Tensor without_margin(const at::Tensor& picture) const {
    return picture.slice(2, margin_, picture.size(2) - margin_).slice(3, margin_, picture.size(3) - margin_);
  }

 private:
  // Returns the places of a mirrored row's pixels in it: to and fro, where the margin is wider than the row.
  at::Tensor to_and_fro(std::int64_t length) const {
    const auto period = 2 * length - 2;
    const auto place = at::arange(-margin_, length + margin_, at::kLong).remainder(period);
    return at::minimum(place, period - place);
  }

  static at::Tensor shares(const std::vector<double>& weights, double whole) {
    const auto relative = torch::tensor(weights, at::kDouble);
    return (relative / relative.sum() * whole).to(at::kFloat);
  }

  Graph closure_;
  std::int64_t margin_;
  Layers content_, style_;
  at::Tensor content_weights_, style_weights_;
};

// Minimizes the objective from `picture` on, which has its margin, and returns the picture that it ends at.
at::Tensor optimized(Objective& objective, const at::Tensor& picture, int iterations) {
  auto x = picture.clone().requires_grad_(true);
  // All iterations in one step: the line search needs what comes before it.
  auto options = torch::optim::LBFGSOptions(1).max_iter(iterations).history_size(history);
  options.tolerance_grad(0).tolerance_change(0).line_search_fn("strong_wolfe");
  torch::optim::LBFGS optimizer({x}, options);
  int evaluations = 0;
  optimizer.step([&] {
    const auto [total, gradient] = objective(x.detach());
    x.mutable_grad() = gradient;
    std::cout << "evaluation " << ++evaluations << "  loss " << total << '\n' << std::flush;
    return at::scalar_tensor(total, at::kFloat);
  });
  return x.detach();
}

// Prints the closure's median time.
void benchmark(Objective& objective, const at::Tensor& picture) {
  objective(picture);  // the first call allocates
  std::vector<double> seconds;
  for (int call = 0; call < benchmark_calls; ++call) {
    const auto begin = std::chrono::steady_clock::now();
    objective(picture);
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  std::sort(seconds.begin(), seconds.end());
  std::cout << R"({"runtime": "libtorch )" << TORCH_VERSION << R"(", "width": )" << picture.size(3) << R"(, "height": )"
            << picture.size(2) << R"(, "calls": )" << benchmark_calls << R"(, "seconds": )"
            << seconds[benchmark_calls / 2] << "}\n";
}

// Writes the gradient at a picture as floats in planes, and prints the loss: for whoever ports the program.
void evaluate(Objective& objective, const at::Tensor& picture, const std::filesystem::path& path) {
  const auto [total, gradient] = objective(picture);
  const auto contiguous = gradient.contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(contiguous.data_ptr()), contiguous.numel() * contiguous.element_size());
  if (!file.flush()) throw std::runtime_error(path.string() + " cannot be written");
  std::cout << std::setprecision(9) << R"({"total": )" << total << "}\n";
}

int whole_number(std::string_view flag, std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    throw std::invalid_argument(std::string(flag) + " must be a whole number, not " + std::string(text));
  return value;
}

Options parsed(int count, char** words) {
  Options options;
  std::vector<std::string_view> positional;
  const std::map<std::string_view, std::function<void(const char*)>> flags = {
      {"--models", [&](const char* value) { options.models = value; }},
      {"--out", [&](const char* value) { options.out = value; }},
      {"--start", [&](const char* value) { options.start = value; }},
      {"--evaluate", [&](const char* value) { options.evaluate = value; }},
      {"--size", [&](const char* value) { options.size = whole_number("--size", value); }},
      {"--iterations", [&](const char* value) { options.iterations = whole_number("--iterations", value); }},
  };
  for (int i = 1; i < count; ++i) {
    const std::string_view word = words[i];
    if (word == "--benchmark") {
      options.benchmark = true;
    } else if (const auto flag = flags.find(word); flag != flags.end() && i + 1 < count) {
      flag->second(words[++i]);
    } else if (word.starts_with("--")) {
      throw std::invalid_argument(std::string(word) + " is unknown, or lacks its value");
    } else {
      positional.push_back(word);
    }
  }
  if (positional.size() != 2) throw std::invalid_argument("a photograph and a style are needed");
  if (options.size < 16 || options.iterations < 1)
    throw std::invalid_argument("--size must be at least 16, --iterations at least 1");
  options.photo = positional[0];
  options.style = positional[1];
  return options;
}

void run(const Options& options) {
  const torch::NoGradGuard no_gradients;  // the closure brings its own
  const auto photo = scaled(read_ppm(options.photo), options.size);
  const auto style = scaled(read_ppm(options.style), options.size);
  Objective objective(options.models, photo, style);
  const auto first = options.start.empty() ? photo : read_ppm(options.start);
  if (first.sizes() != photo.sizes()) throw std::runtime_error(options.start.string() + " has not the photograph's size");
  const auto start = objective.with_margin(first);
  if (options.benchmark) return benchmark(objective, start);
  if (!options.evaluate.empty()) return evaluate(objective, start, options.evaluate);
  write_ppm(options.out, objective.without_margin(optimized(objective, start, options.iterations)));
  std::cout << options.out.string() << '\n';
}

}  // namespace

int main(int count, char** words) {
  try {
    run(parsed(count, words));
  } catch (const std::invalid_argument& error) {
    std::cerr << "stylize: " << error.what()
              << "\nusage: stylize PHOTO.ppm STYLE.ppm [--models FOLDER] [--out FILE] [--size PX] [--iterations N]\n"
                 "               [--start FILE] [--evaluate FILE | --benchmark]\n";
    return 2;
  } catch (const c10::Error& error) {
    std::cerr << "stylize: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "stylize: " << error.what() << '\n';
    return 1;
  }
}

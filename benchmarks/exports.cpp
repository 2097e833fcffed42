// Times an exported graph in TorchScript: for every line on stdin one call, and its seconds on stdout.
//
//     exports GRAPH.pt INPUTS THREADS
//
// INPUTS is a folder: in inputs.txt a line for each input, its name and its shape, and its numbers in NAME.f32.
#include <ATen/Parallel.h>
#include <torch/script.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

using Layers = c10::Dict<std::string, at::Tensor>;

at::Tensor read(const std::string& path, const std::vector<std::int64_t>& shape) {
  auto tensor = at::empty(shape, at::kFloat);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(static_cast<char*>(tensor.data_ptr()), tensor.numel() * 4)) throw std::runtime_error(path);
  return tensor;
}

// Returns the arguments: tensors, and for names such as style.relu1_1 one dictionary of layers.
std::vector<c10::IValue> arguments(const std::string& folder) {
  std::vector<c10::IValue> found;
  std::string line, dictionary;
  Layers layers;
  for (std::ifstream list(folder + "/inputs.txt"); std::getline(list, line);) {
    std::istringstream words(line);
    std::string name;
    words >> name;
    std::vector<std::int64_t> shape;
    for (std::int64_t edge = 0; words >> edge;) shape.push_back(edge);
    const auto tensor = read(folder + "/" + name + ".f32", shape);
    const auto dot = name.find('.');
    if (dot == std::string::npos) {
      found.emplace_back(tensor);
      continue;
    }
    if (name.substr(0, dot) != dictionary) {
      dictionary = name.substr(0, dot);
      layers = Layers();
      found.emplace_back(layers);
    }
    layers.insert(name.substr(dot + 1), tensor);
  }
  return found;
}

int main(int, char** argv) {
  at::set_num_threads(std::stoi(argv[3]));
  const c10::InferenceMode inference;
  auto graph = torch::jit::load(argv[1]);
  const auto inputs = arguments(argv[2]);
  for (std::string line; std::getline(std::cin, line);) {
    const auto begin = std::chrono::steady_clock::now();
    graph.forward(inputs);
    const auto end = std::chrono::steady_clock::now();
    std::cout << std::chrono::duration<double>(end - begin).count() << std::endl;
  }
}

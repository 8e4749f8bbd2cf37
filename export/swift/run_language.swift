var inputs: [String: @@NAME@@.Tensor<Int32>] = [:]
for entry in sample.inputs { inputs[entry.name] = try integers(entry, data) }
var states: [String: @@NAME@@.Tensor<Float>] = [:]
for entry in sample.states { states[entry.name] = try floats(entry, data) }
let name = try XCTUnwrap(sample.function)
let scores = try await model.scores(of: name, inputs: inputs, states: states)
let answer = [@@SCORES_TEXT@@: try @@NAME@@.Tensor(shape: [scores.count], values: scores)]

var inputs: [String: @@NAME@@.Input] = [:]
for entry in sample.inputs {
    switch entry.dtype {
    @@IMAGE_SAMPLE@@
    case "int32": inputs[entry.name] = .integers(try integers(entry, data))
    default: inputs[entry.name] = .floats(try floats(entry, data))
    }
}
let answer = try await model.run(inputs)

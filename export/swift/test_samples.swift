    #if canImport(CoreML)
    func testAnswersOnCPU() async throws { try await compareSamples(on: .cpuOnly) }

    func testAnswersWhereCoreMLChooses() async throws { try await compareSamples(on: .all) }

    private func compareSamples(on units: MLComputeUnits) async throws {
        let (contents, data) = try self.contents()
        try XCTSkipIf(contents.samples.isEmpty, "the bundle holds no samples small enough for a test")
        let model = try await @@NAME@@.load(computeUnits: units)
        for (number, sample) in contents.samples.enumerated() {
            @@RUN_SAMPLE@@
            for output in sample.outputs {
                let actual = try XCTUnwrap(answer[output.name]).values
                let expected = try floats(output, data).values
                compare(actual, expected, tolerance: contents.tolerance, "\(output.name) of sample \(number)")
            }
        }
    }
    #endif

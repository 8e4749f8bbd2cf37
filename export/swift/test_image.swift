    /// An image of stripes and ramps, the same as in Python.
    private func pattern(width: Int, height: Int) throws -> @@NAME@@.Pixels {
        var levels: [UInt8] = []
        for y in 0..<height {
            for x in 0..<width {
                for channel in 0..<3 { levels.append(UInt8((x * 7 + y * 13 + x * y * 3 + channel * 101) % 256)) }
            }
        }
        return try @@NAME@@.Pixels(width: width, height: height, levels: levels)
    }

    func testImagesAreScaledAsInPython() throws {
        let (contents, data) = try self.contents()
        let expected = try floats(XCTUnwrap(contents.image), data).values
        let actual = @@NAME@@.recipe.levels(of: try pattern(width: @@PATTERN_WIDTH@@, height: @@PATTERN_HEIGHT@@))
        let places = stride(from: 0, to: actual.count, by: @@PATTERN_STEP@@).map { actual[$0] }
        XCTAssertEqual(places.count, expected.count)
        for (got, wanted) in zip(places, expected) { XCTAssertEqual(got, wanted, accuracy: 0.01) }
    }

    func testOrientations() throws {
        // Two rows of three pixels: 0 1 2 and 3 4 5.
        let image = try @@NAME@@.Pixels(width: 3, height: 2, levels: (0..<6).flatMap { [$0, $0, $0] })
        let upright: [Int: [UInt8]] = [
            1: [0, 1, 2, 3, 4, 5], 2: [2, 1, 0, 5, 4, 3], 3: [5, 4, 3, 2, 1, 0], 4: [3, 4, 5, 0, 1, 2],
            5: [0, 3, 1, 4, 2, 5], 6: [3, 0, 4, 1, 5, 2], 7: [5, 2, 4, 1, 3, 0], 8: [2, 5, 1, 4, 0, 3],
        ]
        for (orientation, wanted) in upright {
            let turned = image.upright(orientation: orientation)
            XCTAssertEqual(turned.width, orientation < 5 ? 3 : 2)
            XCTAssertEqual(stride(from: 0, to: 18, by: 3).map { turned.levels[$0] }, wanted, "orientation \(orientation)")
        }
    }

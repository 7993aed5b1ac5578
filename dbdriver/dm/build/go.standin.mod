// The same build over a stand-in that has the driver's few names and never connects: what compiles with it is checked
// where the driver cannot be had. A program built with it refuses to start.
module yinjian.dm

go 1.26.0

require (
	gitee.com/chunanyong/dm v1.8.23
	yinjian v0.0.0
)

replace yinjian => ../../..

replace gitee.com/chunanyong/dm => ./standin

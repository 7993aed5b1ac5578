// The build with DM's driver. Nothing in the module above refers to this one, so that it builds, is checked and is
// vendored without the driver. See docs/database.md.
module yinjian.dm

go 1.26.0

require (
	gitee.com/chunanyong/dm v1.8.23
	yinjian v0.0.0
)

replace yinjian => ../../..

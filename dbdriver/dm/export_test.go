package dm

// What a build with the driver uses inside.
var (
	DriverDSN = (*Config).driverDSN
	Dialer    = (*Config).dialer
)

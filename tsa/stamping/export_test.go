package stamping

// DigestOf names a key with its chain.
var DigestOf = digestOf

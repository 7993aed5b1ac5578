package account

// OwnedBy is what is done to another appliance's objects before they are applied.
func (a *Application) OwnedBy(node string) { a.ownedBy(node) }

// OwnedBy is likewise.
func (g *Signer) OwnedBy(node string) { g.ownedBy(node) }

// OwnedBy is likewise.
func (a *Administrator) OwnedBy(node string) { a.ownedBy(node) }

// PasswordIterations is what the program has; the tests make do with fewer.
var PasswordIterations = passwordIterations

func init() { passwordIterations = 1000 }

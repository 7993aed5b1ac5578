package account

// OwnedBy is what is done to another appliance's objects before they are applied.
func (a *Application) OwnedBy(node string) { a.ownedBy(node) }

// OwnedBy is likewise.
func (g *Signer) OwnedBy(node string) { g.ownedBy(node) }

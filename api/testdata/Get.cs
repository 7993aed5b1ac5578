using System;
using System.IO;
using System.Net;

// Get URL: what an old .NET program does, with TLS 1.2 and its framework's own client. Any certificate is taken.
class Get
{
    static int Main(string[] args)
    {
        ServicePointManager.SecurityProtocol = SecurityProtocolType.Tls12;
        ServicePointManager.ServerCertificateValidationCallback = (sender, certificate, chain, errors) => true;
        try
        {
            using (WebResponse answer = WebRequest.Create(args[0]).GetResponse())
            using (StreamReader body = new StreamReader(answer.GetResponseStream()))
                Console.WriteLine(body.ReadToEnd());
            return 0;
        }
        catch (WebException e)
        {
            Console.WriteLine(e);
            return 1;
        }
    }
}

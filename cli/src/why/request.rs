//! The request or connection that is to be explained, as the command line has it.

use anyhow::{Context, bail, ensure};
use form_urlencoded::Serializer;
use http::{Method, Uri};

/// What a client asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// `HOST:PORT` or `ADDRESS:PORT`.
    pub(super) destination: String,
    /// What is asked there; none for a connection without HTTP.
    pub(super) http: Option<Http>,
    /// The name that the TLS of a connection asks for; none for one without TLS.
    pub(super) server_name: Option<String>,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Http {
    method: Method,
    /// With the query.
    path: String,
    host: String,
    /// One field a line.
    headers: String,
}

impl Request {
    /// Reads `http://HOST[:PORT][/PATH]` or `HOST:PORT`.
    ///
    /// # Errors
    /// What can't be read.
    pub(super) fn parse(
        target: &str,
        method: Method,
        headers: &[String],
        server_name: Option<&str>,
    ) -> anyhow::Result<Request> {
        let Some(rest) = target.strip_prefix("http://") else {
            ensure!(!target.contains("://"), "{target}: only http:// and HOST:PORT can be explained");
            let port = target.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            port.with_context(|| format!("{target}: a port is missing, as in web.shop:80"))?;
            ensure!(headers.is_empty(), "header fields belong to a request: http://{target}");
            let server_name = server_name.map(str::to_owned);
            return Ok(Request { destination: target.to_owned(), http: None, server_name });
        };
        ensure!(server_name.is_none(), "a name that TLS asks for belongs to a connection: HOST:PORT");
        let uri: Uri = target.parse().with_context(|| format!("{target}: it is no URL"))?;
        let authority = uri.authority().with_context(|| format!("{target}: it has no host"))?;
        if authority.as_str().contains('@') || rest.is_empty() {
            bail!("{target}: it must be http://HOST[:PORT][/PATH]");
        }
        let port = authority.port_u16().unwrap_or(80);
        for line in headers {
            ensure!(line.contains(':') && !line.contains('\n'), "header {line:?}: it must be NAME: VALUE");
        }
        let path = uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        let host = authority.to_string();
        let http = Http { method, path, host, headers: headers.join("\n") };
        let destination = format!("{}:{port}", authority.host());
        Ok(Request { destination, http: Some(http), server_name: None })
    }

    /// For people.
    pub(super) fn shown(&self) -> String {
        match &self.http {
            Some(Http { method, path, host, .. }) => format!("{method} http://{host}{path}"),
            None => match &self.server_name {
                Some(name) => format!("a connection to {} with TLS for {name:?}", self.destination),
                None => format!("a connection to {}", self.destination),
            },
        }
    }

    /// What a waypoint is asked, as the path of its admin server.
    pub(super) fn question(&self, authority: &str, client: &str, source: &str) -> String {
        if let Some(http) = &self.http {
            return http.question(authority, client, source);
        }
        let mut query = Serializer::new(String::new());
        query.append_pair("to", authority).append_pair("from", client).append_pair("source", source);
        if let Some(name) = &self.server_name {
            query.append_pair("server-name", name);
        }
        format!("/explain/connection?{}", query.finish())
    }
}

impl Http {
    fn question(&self, authority: &str, client: &str, source: &str) -> String {
        let Http { method, path, host, headers } = self;
        let mut query = Serializer::new(String::new());
        query.append_pair("to", authority).append_pair("from", client).append_pair("source", source);
        query.append_pair("method", method.as_str()).append_pair("path", path).append_pair("host", host);
        if !headers.is_empty() {
            query.append_pair("headers", headers);
        }
        format!("/explain/request?{}", query.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(target: &str) -> anyhow::Result<Request> {
        Request::parse(target, Method::GET, &[], None)
    }

    #[test]
    fn a_url_is_a_request_and_a_host_with_port_a_connection() -> anyhow::Result<()> {
        let url = parse("http://reviews.bookinfo:9080/reviews/0?x=y")?;
        assert_eq!(url.destination, "reviews.bookinfo:9080");
        assert_eq!(url.shown(), "GET http://reviews.bookinfo:9080/reviews/0?x=y");
        assert_eq!(parse("http://web")?.destination, "web:80");
        assert_eq!(parse("http://[fd00::1]:8080/")?.destination, "[fd00::1]:8080");
        let connection = parse("db.shop:5432")?;
        assert_eq!((connection.destination.as_str(), connection.http), ("db.shop:5432", None));
        for wrong in ["db.shop", "https://web", "http://", "http://a@b/", "db:port"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(Request::parse("http://web", Method::GET, &["x".to_owned()], None).is_err());
        assert!(Request::parse("http://web", Method::GET, &[], Some("a.b")).is_err());
        assert!(Request::parse("web:80", Method::GET, &["a: b".to_owned()], None).is_err());
        Ok(())
    }

    #[test]
    fn a_waypoint_is_asked_with_everything_that_may_decide() -> anyhow::Result<()> {
        let headers = ["end-user: jason".to_owned(), "x: 1".to_owned()];
        let request = Request::parse("http://web/a%20b", Method::POST, &headers, None)?;
        let question =
            |request: &Request| request.question("web.shop.svc:80", "spiffe://td/ns/a/sa/b", "10.0.0.1");
        assert_eq!(
            question(&request),
            "/explain/request?to=web.shop.svc%3A80&from=spiffe%3A%2F%2Ftd%2Fns%2Fa%2Fsa%2Fb&source=10.0.0.1\
             &method=POST&path=%2Fa%2520b&host=web&headers=end-user%3A+jason%0Ax%3A+1"
        );
        let connection = Request::parse("db:5432", Method::GET, &[], Some("db.example"))?;
        assert_eq!(
            question(&connection),
            "/explain/connection?to=web.shop.svc%3A80&from=spiffe%3A%2F%2Ftd%2Fns%2Fa%2Fsa%2Fb&source=10.0.0.1\
             &server-name=db.example"
        );
        Ok(())
    }
}
